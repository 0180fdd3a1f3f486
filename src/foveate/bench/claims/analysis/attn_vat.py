"""Virtual adversarial training of attention: 50 labelled sentences and 500 without labels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveate.analysis.attn_at import AttnAT
from foveate.analysis.attn_vat import AttnVAT
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

CLAIM = "perturbed attention on unlabelled texts helps more than with labels alone, or embeddings"

_STEPS, _LABELLED, _UNLABELLED = 300, 50, 500


def measure() -> Outcome:
    """Accuracy and agreement with gradients of four objectives on the same sentences."""
    test = planted_token(500, seed=-1)
    seen = planted_token(_LABELLED + _UNLABELLED, seed=0, labelled=_LABELLED)
    ways: dict[str, Objective] = {
        "labels alone": supervised,
        "AT": _adversarial,
        "VAT": _virtual,
        "VAT of embeddings": _of_embeddings,
    }
    figures = {}
    for name, objective in ways.items():
        model = train(objective, partial(_drawn, seen), steps=_STEPS)
        figures[f"accuracy, {name}"] = attended(model, test)[0]
        figures[f"agreement with gradients, {name}"] = gradient_agreement(model, test)
    others = [figures[f"accuracy, {name}"] for name in ways if name != "VAT"]
    return Outcome(figures, figures["accuracy, VAT"] > max(others))


def _adversarial(
    model: Pooler, batch: Planted, states: Tensor, logits: Tensor, step: int
) -> Tensor:
    labels = batch.labels[:_LABELLED]

    def loss(a: Tensor) -> Tensor:
        return cross_entropy(model.classify(states[:_LABELLED], a), labels, reduction="none")

    return AttnAT(epsilon=3.0)(loss, logits[:_LABELLED])


def _virtual(model: Pooler, batch: Planted, states: Tensor, logits: Tensor, step: int) -> Tensor:
    term = AttnVAT(epsilon=3.0)(lambda a: model.classify(states, a), logits, seed=step)
    return supervised(model, batch, states, logits) + term


def _of_embeddings(
    model: Pooler, batch: Planted, states: Tensor, logits: Tensor, step: int
) -> Tensor:
    """The same objective with the perturbation on the embeddings."""

    def predict(embedded: Tensor) -> Tensor:
        mixed = model.states(embedded)
        return model.classify(mixed, model.logits(mixed, batch.valid))

    term = AttnVAT(epsilon=3.0)(predict, model.embed(batch.inputs), seed=step)
    return supervised(model, batch, states, logits) + term


def _drawn(seen: Planted, step: int) -> Planted:
    """All labelled sentences and as many of the others."""
    made = torch.Generator().manual_seed(step)
    at = _LABELLED + torch.randint(_UNLABELLED, (_LABELLED,), generator=made)
    at = torch.cat((torch.arange(_LABELLED), at))
    return Planted(*(x[at] for x in seen))
