"""MatryoshkaKV (2024, paper 102): trained axes against principal axes, as ranks fall."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.attention._trained import InTraining
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.train import text_loss, train
from foveate.cache.matryoshka_kv import MatryoshkaKV
from foveate.hf.attach import attach

CLAIM = "axes that were trained beat principal axes at half of the coordinates, at a quarter more"

_LENGTH, _WINDOWS, _HELD_OUT, _STEPS, _RATE = 128, 24, 8, 40, 3e-3
_EIGHTHS = {"all": 8, "3/4": 6, "1/2": 4, "1/4": 2}


def measure() -> Outcome:
    """Perplexity of held-out windows of 128 tokens, all their keys and values reduced."""
    figures = _perplexities("principal", 0) | _perplexities("trained", _STEPS)
    half, quarter = (
        figures[f"perplexity, trained axes, {share}"]
        / figures[f"perplexity, principal axes, {share}"]
        for share in ("1/2", "1/4")
    )
    return Outcome(figures, quarter < half < 1)


def _perplexities(name: str, steps: int) -> dict[str, float]:
    """Of axes after so many steps, at every share of the coordinates."""
    model, _ = loaded()
    count = _WINDOWS + _HELD_OUT
    ids = text_ids(_LENGTH * count).view(count, _LENGTH)
    learner = train(model, MatryoshkaKV(), [ids[:_WINDOWS]], steps=steps, lr=_RATE).learner
    return {
        f"perplexity, {name} axes, {share}": _perplexity(learner, eighths, ids[_WINDOWS:])
        for share, eighths in _EIGHTHS.items()
    }


@torch.no_grad()
def _perplexity(learner: Any, eighths: int, windows: Tensor) -> float:
    """With so many eighths of the coordinates kept everywhere."""
    learner.parts = torch.full(learner.mean.shape[:3], eighths)
    with attach(loaded()[0], prefill=InTraining(learner=learner)):
        losses = [text_loss(loaded()[0], ids) for ids in windows.split(1)]
    return float(torch.stack(losses).mean().exp())
