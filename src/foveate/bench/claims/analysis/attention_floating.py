"""Anchors over eight steps of filling periodic rows, of a denoiser and of its causal twin."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from foveate.analysis.attention_floating import AttentionFloating
from foveate.bench.claims import Outcome
from foveate.bench.claims.analysis._periodic import LENGTH, filled, filler, framed
from foveate.tasks.masked_periodic import masked_periodic, unmask

CLAIM = "anchors of a denoiser that looks both ways move more and hold less than its causal twin's"

_TEXTS, _STEPS, _SINK = 32, 8, 0.3


def measure() -> Outcome:
    """Two BERTs of two layers; each fills 32 rows, of which half is masked."""
    both, twin = (_figures(filler(causal=causal)) for causal in (False, True))
    figures = {
        f"{name}, {who}": x
        for who, found in (("both ways", both), ("causal", twin))
        for name, x in found.items()
    }
    moves = both["overlap of anchors"] < twin["overlap of anchors"]
    sink = twin["share of the start token"] > _SINK
    remark = "" if sink else "at this size the causal twin has no sink that could stay where it is"
    return Outcome(figures, moves and both["absorption"] < twin["absorption"], remark)


@torch.no_grad()
def _figures(model: Any) -> dict[str, float]:
    batch = masked_periodic(_TEXTS, seed=1_000_000, length=LENGTH, masked=(0.5, 0.5))
    states = unmask(partial(filled, model), batch.inputs, steps=_STEPS)
    record = AttentionFloating()(model, [framed(rows) for rows in states])
    right = (states[-1] == batch.targets)[batch.mask]
    return {
        "accuracy": float(right.float().mean()),
        "absorption": float(record["absorption"].mean()),
        "share of the start token": float(record["first"].mean()),
        "overlap of anchors": float(record["overlap"].mean()),
        "entropy of their places": float(record["wander"].mean()),
    }
