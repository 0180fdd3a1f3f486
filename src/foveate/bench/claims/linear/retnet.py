"""Retention (2023): a parallel form and one of constant time for every token."""

from __future__ import annotations

from typing import Any

import torch

from foveate.bench.claims import Outcome
from foveate.bench.timing import paired
from foveate.nn._recurrent import state_bytes
from foveate.registry import create

CLAIM = "what trains in parallel decodes in constant time and memory, to the same numbers"

_DIM, _HEADS, _SHORT, _LONG = 128, 4, 64, 4096


@torch.inference_mode()
def measure() -> Outcome:
    """The last 64 of 4,096 tokens one at a time, and the time of a token after 64 and 4,096."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = create("retnet", dim=_DIM, heads=_HEADS)
    x = torch.randn(1, _LONG + _SHORT, _DIM, generator=torch.Generator().manual_seed(0))
    whole = layer(x)
    _, early = layer(x[:, :_SHORT], return_state=True)
    _, late = layer(x[:, :_LONG], return_state=True)
    state, off = late, 0.0
    for t in range(_LONG, _LONG + _SHORT):
        y, state = layer.step(x[:, t], state)
        off = max(off, float((y - whole[:, t]).abs().max()))
    ratio = paired(lambda: _steps(layer, x, late), lambda: _steps(layer, x, early), 15)[2]
    figures = {
        "largest difference, token by token": off,
        "time of a token after 4,096 / after 64": ratio,
        "state KB after 4,096 / after 64": state_bytes(late) / state_bytes(early),
    }
    return Outcome(figures, off < 1e-4 and 0.8 < ratio < 1.25)


def _steps(layer: Any, x: torch.Tensor, state: Any) -> None:
    for t in range(32):
        _, state = layer.step(x[:, t], state)
