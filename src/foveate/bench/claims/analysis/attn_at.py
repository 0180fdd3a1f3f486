"""Adversarial training of attention: accuracy, robustness, and agreement with gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveate.analysis.attn_at import AttnAT
from foveate.bench.claims import Outcome
from foveate.bench.claims._pooling import (
    Objective,
    Pooler,
    attended,
    gradient_agreement,
    supervised,
    train,
)
from foveate.tasks.planted_token import Planted, planted_token

CLAIM = "trained against perturbed logits, attention agrees better with gradients, at no loss"

_STEPS, _ROWS, _NOISE = 400, 400, 3.0


def measure() -> Outcome:
    """Plain training and both norms, on few sentences of which a tenth have wrong labels."""
    test = planted_token(500, seed=-1)
    seen = planted_token(_ROWS, seed=0, noise=0.1)
    ways: dict[str, Objective] = {
        "plain": supervised,
        "AT": partial(_adversarial, AttnAT(epsilon=3.0)),
        "iAT": partial(_adversarial, AttnAT(epsilon=1.0, norm="position")),
    }
    figures = {}
    for name, objective in ways.items():
        model = train(objective, partial(_drawn, seen), steps=_STEPS)
        figures[f"accuracy, {name}"] = attended(model, test)[0]
        figures[f"accuracy under noise, {name}"] = _under_noise(model, test)
        figures[f"agreement with gradients, {name}"] = gradient_agreement(model, test)
    better = figures["agreement with gradients, AT"] > figures["agreement with gradients, plain"]
    return Outcome(figures, better and figures["accuracy, AT"] >= figures["accuracy, plain"])


def _adversarial(
    at: AttnAT, model: Pooler, batch: Planted, states: Tensor, logits: Tensor, step: int
) -> Tensor:
    def loss(a: Tensor) -> Tensor:
        return cross_entropy(model.classify(states, a), batch.labels, reduction="none")

    return at(loss, logits)


def _drawn(seen: Planted, step: int) -> Planted:
    at = torch.randint(_ROWS, (64,), generator=torch.Generator().manual_seed(step))
    return Planted(*(x[at] for x in seen))


@torch.no_grad()
def _under_noise(model: Pooler, test: Planted) -> float:
    """Accuracy when the attention logits have normal noise added."""
    states = model.states(model.embed(test.inputs))
    logits = model.logits(states, test.valid)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return test.accuracy(model.classify(states, logits + _NOISE * noise))
