"""Efficient Attention (2018, paper 196): time and memory that grow with the tokens, not squared."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from foveate import ops
from foveate.bench.claims import Outcome
from foveate.bench.timing import paired
from foveate.nn.linear.efficient_attn import EfficientAttn

CLAIM = "time and memory grow with the number of tokens, where those of dense attention are squared"

_WIDTH = 32
# Tokens of maps of 32, 64 and 128 cells aside.
_LENGTHS = (32**2, 64**2, 128**2)


@torch.inference_mode()
def measure() -> Outcome:
    """One head over all cells of a map: seconds against dense attention, and what is held.

    Held are the context matrix here and the weights there, which a fused kernel recomputes.
    """
    figures: dict[str, float] = {}
    seconds = []
    for length in _LENGTHS:
        linear, dense = _pair(length)
        mine, full, ratio = paired(linear, dense, 5 if length < _LENGTHS[-1] else 3)
        seconds.append((mine, full))
        figures[f"times faster than dense, {length} tokens"] = 1 / ratio
    powers = [
        math.log(late / early, _LENGTHS[-1] / _LENGTHS[0])
        for early, late in zip(seconds[0], seconds[-1], strict=True)
    ]
    figures["time grows with tokens to the power"] = powers[0]
    figures["that of dense attention to the power"] = powers[1]
    figures["context KB"] = _WIDTH * _WIDTH * 4 / 1e3
    figures[f"dense weights MB, {_LENGTHS[-1]} tokens"] = _LENGTHS[-1] ** 2 * 4 / 1e6
    return Outcome(figures, powers[0] < 1.5 < powers[1])


def _pair(length: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The layer and dense attention between the same projections."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, x = EfficientAttn(_WIDTH, 1), torch.randn(1, length, _WIDTH)

    def dense() -> Tensor:
        q, k, v = (part(x)[:, None] for part in (layer.q, layer.k, layer.v))
        y: Tensor = layer.out(ops.attend(q, k, v)[:, 0])
        return y

    return lambda: layer(x, causal=False), dense
