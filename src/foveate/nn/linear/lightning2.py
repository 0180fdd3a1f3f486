"""Lightning Attention-2: unlimited sequence lengths (2024, paper 22)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate import ops
from foveate.nn._attention import heads_of
from foveate.nn._linear import Readout, head_width
from foveate.nn._recurrent import Recurrent
from foveate.registry import Card, register

PRESETS = ("alibi", "minimax", "tnl")


def decay_slopes(
    decay: tuple[float, ...] | str, heads: int, index: int = 0, layers: int = 1
) -> tuple[float, ...]:
    """Slopes s >= 0 of each head, which keeps exp(-s) of its state at a token: given, or a preset.

    "alibi" is 2^(-8(h+1)/H) for head h of H (a power of two; else those of the next lower one and
    every other one of its double), "minimax" that formula for every H times 1 - index / (layers -
    1), "tnl" 8h/H · (1 - index / layers), with which head 0 forgets nothing. Raises ValueError for
    an unknown preset, a negative slope, and numbers of heads or layers that do not fit.
    """
    ops.check_block("heads", heads)
    if not 0 <= index < layers:
        raise ValueError(f"index must be in [0, layers), got {index} of {layers} layers")
    if not isinstance(decay, str):
        if len(decay) != heads or min(decay) < 0:
            raise ValueError(f"decay must be {heads} slopes of at least 0, got {decay}")
        return tuple(decay)
    if decay not in PRESETS:
        raise ValueError(f"unknown decay {decay!r}; known: {', '.join(PRESETS)}, or slopes")
    if decay == "alibi":
        return _alibi(heads)
    if decay == "minimax":
        share = 1 - index / (layers - 1 + 1e-5) + 1e-5
        return tuple(share * slope for slope in _powers(heads))
    return tuple(8 * h / heads * (1 - index / layers) for h in range(heads))


def lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: tuple[float, ...],
    *,
    state: Tensor | None = None,
    valid: Tensor | None = None,
    block: int = 64,
) -> tuple[Tensor, Tensor]:
    """o_t = Σ_{j≤t} exp(-s_h (t - j)) (q_t·k_j) v_j of each head, `block` tokens at a time.

    q and k (B, H, L, K), v (B, H, L, V), one slope s_h a head -> (B, H, L, V) and the last state
    (B, H, K, V) in float32; there is no scale. Raises as `ops.scan`.
    """
    decay = -torch.tensor(slopes, device=q.device)
    return ops.scan(q, k, v, decay=decay, scale=1.0, state=state, valid=valid, chunk=block)


def _powers(heads: int) -> tuple[float, ...]:
    return tuple(2 ** (-8 * (h + 1) / heads) for h in range(heads))


def _alibi(heads: int) -> tuple[float, ...]:
    """Slopes of ALiBi."""
    lower = 1 << int(math.log2(heads))
    return _powers(lower) + _powers(2 * lower)[::2][: heads - lower]


@register(
    Card(
        name="lightning2",
        title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in "
        "Large Language Models",
        year=2024,
        paper=22,
        claim="blocks, with one state between them, keep training speed constant in length",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·(C + D)·D) time in blocks of C tokens",
        decoding="a state of heads · D² numbers",
        confidence="high",
        small={"dim": 32, "heads": 4},
    )
)
class Lightning2(Recurrent):
    """o_t = Σ_{j≤t} exp(-s_h (t - j)) (SiLU(q_t)·SiLU(k_j)) v_j, then a norm of each head.

    `decay` is the slope s of every head, or the name of a preset as in `decay_slopes`, to which
    the layer's `index` among `layers` matters. Raises ValueError for a decay that does not fit and
    for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        decay: tuple[float, ...] | str = "alibi",
        index: int = 0,
        layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width = head_width(dim, heads)
        self.slopes = decay_slopes(decay, heads, index, layers)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **made)
        self.readout = self.way_out(heads, made)

    def way_out(self, heads: int, made: dict[str, Any]) -> nn.Module:
        """What makes tokens of heads (B, H, L, width) and the layer's input."""
        return Readout(self.dim, heads, self.width, **made)

    def split(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, H, L, ·) of x (B, L, dim) at positions (B, L)."""
        q, k, v = heads_of(self.qkv(x), 3 * self.width).chunk(3, -1)
        return silu(q), silu(k), v

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The recurrence."""
        at = state.pos[:, None] + torch.arange(x.shape[1], device=x.device)
        q, k, v = self.split(x, at)
        out, s = lightning(q, k, v, self.slopes, state=state.s, valid=valid)
        return self.readout(out, x), replace(state, s=s)
