"""Attention as an RNN (2024, paper 130): the same numbers as attention, in constant memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.bench.claims import Outcome
from foveate.bench.timing import paired
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._recurrent import state_bytes
from foveate.registry import create

CLAIM = "attention with a constant query is computed as a recurrence, in constant memory and time"

_DIM, _HEADS, _SHORT, _LONG = 128, 4, 64, 4096


@torch.inference_mode()
def measure() -> Outcome:
    """The difference from masked attention at 4,096 tokens; memory and time of a further token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = create("aaren", dim=_DIM, heads=_HEADS)
        dense = create("softmax_attention", dim=_DIM, heads=_HEADS)
    x = torch.randn(1, _LONG, _DIM, generator=torch.Generator().manual_seed(0))
    y, late = layer(x, return_state=True)
    off = float((y - _attention(layer, x)).abs().max())
    figures = {"largest difference from attention": off}
    for name, model in (("aaren", layer), ("softmax", dense)):
        _, early = model(x[:, :_SHORT], return_state=True)
        _, late = model(x, return_state=True)
        grown = state_bytes(late) / state_bytes(early)
        slower = paired(_steps(model, x, late), _steps(model, x, early), 15)[2]
        figures[f"memory after 4,096 / after 64 tokens, {name}"] = grown
        figures[f"time of a token after 4,096 / after 64, {name}"] = slower
    _, memory, slower, _, _ = figures.values()
    return Outcome(figures, off < 1e-4 and memory == 1 and 0.8 < slower < 1.25)


def _attention(layer: Any, x: Tensor) -> Tensor:
    """Softmax attention in which every token asks with the query of its head."""
    q = layer.q(layer.query).view(1, _HEADS, 1, -1).expand(-1, -1, x.shape[1], -1)
    k, v = (heads_of(part(x), layer.width) for part in (layer.k, layer.v))
    out: Tensor = layer.out(joined_heads(ops.attend(q, k, v, causal=True)))
    return out


def _steps(model: Any, x: Tensor, state: Any) -> Any:
    """A function that takes 16 more tokens."""

    def run() -> None:
        now = state
        for t in range(16):
            _, now = model.step(x[:, t], now)

    return run
