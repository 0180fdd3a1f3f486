"""Limits of low-rank features: errors of attention and of its gradient as logits grow."""

from __future__ import annotations

import math

import torch

from foveate.analysis.lora_limits import LoraLimits
from foveate.bench.claims import Outcome

CLAIM = "low-rank features give attention and its gradient at small logits, and fail at large ones"

_LENGTH, _DIM, _HEADS = 512, 8, 4


def measure() -> Outcome:
    """Random heads in float64 at bounds on |logit| around √log L, means over heads."""
    root = math.log(_LENGTH) ** 0.5
    shares = (0.25, 1.0, 4.0)
    made = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, _HEADS, _LENGTH, _DIM, generator=made, dtype=torch.float64)
    record = LoraLimits(bounds=tuple(share * root for share in shares))(q, k, v)
    figures = {
        f"{name} at |logit| {share * root:.2f}": float(record[name][i].mean())
        for name in ("output", "gradient", "rank")
        for i, share in enumerate(shares)
    }
    grows = all(bool((record[name].mean(1).diff() > 0).all()) for name in record.values)
    works = float(record["output"][0].mean()) < 0.05 and float(record["gradient"][0].mean()) < 0.05
    fails = float(record["output"][-1].mean()) > 0.5
    return Outcome(figures, grows and works and fails)
