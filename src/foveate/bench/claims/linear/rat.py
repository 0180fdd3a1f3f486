"""RAT (2025, paper 275): what attention to one key a chunk saves, and what it costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate import create
from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import spoken
from foveate.bench.timing import paired

CLAIM = "attention to one key a chunk decodes faster than attention to all, at the same loss"

_TOKENS = 8192


def measure() -> Outcome:
    """A decoding step after 8,192 tokens; loss on bytes of two layers, rows of 64; chunks of 16."""
    with torch.inference_mode():
        figures = {"times faster than attention": _faster()}
    patterns = {"attention": "dense", "chunks of 16": "rat"}
    figures |= spoken(patterns, steps=150, length=64)
    near = figures["loss, chunks of 16"] < figures["loss, attention"] + 0.05
    return Outcome(figures, near and figures["times faster than attention"] > 1)


def _faster() -> float:
    """How many times faster a step is than one of softmax attention over the same tokens."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(2, _TOKENS, 256, generator=made)
    steps = []
    for spec in ("softmax_attention", "rat"):
        layer = create(spec, dim=256, heads=4).eval()
        _, state = layer(x, return_state=True)

        def step(layer: Any = layer, state: Any = state) -> Tensor:
            y: Tensor = layer.step(x[:, 0], state)[0]
            return y

        steps.append(step)
    return paired(steps[0], steps[1], 21)[2]
