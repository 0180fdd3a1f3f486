"""Rollout and flow: do they tell which tokens a trained model needs better than raw attention?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.analysis.base import rank_correlation
from foveate.analysis.rollout_flow import RolloutFlow
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded
from foveate.bench.claims._toys import toy
from foveate.tasks.needle_kv import needles
from foveate.tasks.train import fit

CLAIM = "attention followed through all layers ranks tokens by their effect better than one layer's"

# Tokens 1 to 4 speak for one class, 5 to 8 for the other, the rest for none; then the question.
_WORDS, _VOCABULARY, _LENGTH, _ASKED = 4, 24, 16, 23
_FILLER = 9
_TEXTS = 40


def measure() -> Outcome:
    """A tiny model that finds the majority; rank correlation with what leaving a token out does."""
    model = _majority_model()
    inputs, labels = _rows(_TEXTS, seed=10_000)
    effects, accuracy = _left_out(model, inputs, labels)
    record = RolloutFlow(flow=True)(model, inputs)
    found = {name: _agreement(record[name][:, 0, :-1], effects) for name in record.values}
    figures = {f"rank correlation, {name}": value for name, value in found.items()}
    figures = {"accuracy": accuracy} | figures | _on_needles()
    if accuracy < 0.9:
        return Outcome(figures, None, "the model did not learn to find the majority")
    return Outcome(figures, min(found["rollout"], found["flow"]) > found["raw"])


def _rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Texts (count, L) in which one class has more words than the other, and which it is."""
    made = torch.Generator().manual_seed(seed)
    kind = torch.randint(4, (count, _LENGTH - 1), generator=made)  # 0, 1: a class; 2, 3: neither
    even = (kind == 1).sum(1) == (kind == 0).sum(1)
    kind[even, 0] = torch.where(kind[even, 0] == 0, 1, 0)
    labels = (kind == 1).sum(1) > (kind == 0).sum(1)
    word = torch.randint(_WORDS, kind.shape, generator=made)
    filler = torch.randint(_FILLER, _ASKED, kind.shape, generator=made)
    ids = torch.where(kind < 2, 1 + kind * _WORDS + word, filler)
    return torch.nn.functional.pad(ids, (0, 1), value=_ASKED), labels.long()


def _majority_model() -> Any:
    """A causal model of three layers that names the class, as token 0 or 1, at the question."""
    model = toy(vocabulary=_VOCABULARY, length=_LENGTH, layers=3)

    def loss(step: int) -> Tensor:
        inputs, labels = _rows(64, seed=step)
        return torch.nn.functional.cross_entropy(model(inputs).logits[:, -1, :2], labels)

    fit(model.parameters(), loss, steps=300, lr=3e-3)
    return model


@torch.no_grad()
def _left_out(model: Any, inputs: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """How much the probability of the model's answer moves without each token, and accuracy."""
    plain = model(inputs).logits[:, -1, :2].softmax(-1)
    answer = plain.argmax(-1, keepdim=True)
    effects = []
    for at in range(_LENGTH - 1):
        without = inputs.clone()
        without[:, at] = _FILLER
        moved = model(without).logits[:, -1, :2].softmax(-1)
        effects.append((plain - moved).gather(1, answer).abs())
    return torch.cat(effects, 1), float((answer[:, 0] == labels).float().mean())


def _agreement(relevance: Tensor, effects: Tensor) -> float:
    """Mean rank correlation over texts."""
    pairs = zip(relevance, effects, strict=True)
    return sum(rank_correlation(*pair) for pair in pairs) / len(effects)


def _on_needles() -> dict[str, float]:
    """Relevance of the needle for the last token over that of as many other tokens, on average.

    The first token, which holds most of it, is left out.
    """
    model, tokenizer = loaded()
    gains = []
    for prompt in needles(tokenizer, rows=4, seed=0):
        relevance = RolloutFlow()(model, prompt.ids)["rollout"][0, 0].clone()
        relevance[0] = 0.0
        a, b = prompt.spans["needle"]
        gains.append(float(relevance[a:b].mean() / relevance[1:].mean()))
    return {"needle over an average token, built-in model": sum(gains) / len(gains)}
