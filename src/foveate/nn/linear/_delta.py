"""What layers that write by the delta rule share: a key's old value is taken out of the state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import heads_of
from foveate.nn._linear import Readout, ShortConv, head_width
from foveate.nn._recurrent import Recurrent

_EPS = 1e-6


class DeltaRule(Recurrent):
    """S_t = (I - β_t k_t k_tᵀ) exp(g_t) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t / sqrt(K).

    A subclass gives g, the logarithm of what is kept, in `decay`. q, k and v pass a causal
    convolution of `conv` tokens and SiLU, q and k have length 1; β is a sigmoid of the input,
    doubled where `negative`, so that a state may change sign. Every key head serves
    v_heads / heads consecutive value heads, each of which has a state, β and g of its own.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        v_heads: int | None = None,
        *,
        expand_k: float,
        expand_v: float,
        conv: int,
        negative: bool,
        gate: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.k_width = head_width(dim, heads, expand_k)
        v_heads = heads if v_heads is None else ops.check_block("v_heads", v_heads)
        if v_heads % heads:
            raise ValueError(f"v_heads must be a multiple of heads, got {v_heads} and {heads}")
        self.v_width = head_width(dim, v_heads, expand_v)
        self.v_heads, self.group, self.negative = v_heads, v_heads // heads, negative
        self.sizes = (heads * self.k_width, heads * self.k_width, v_heads * self.v_width)
        self.qkv = nn.Linear(dim, sum(self.sizes), bias=False, **made)
        self.convs = ShortConv(sum(self.sizes), conv, **made)
        self.beta = nn.Linear(dim, v_heads, bias=False, **made)
        self.readout = Readout(dim, v_heads, self.v_width, gate="silu" if gate else None, **made)

    def decay(self, x: Tensor) -> Tensor | None:
        """g (B, v_heads, L) of x (B, L, dim), None where nothing is forgotten."""
        return None

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The recurrence."""
        mixed, conv = self.convs(self.qkv(x), valid, *state.conv)
        q, k, v = mixed.split(self.sizes, -1)
        q, k = (unit(heads_of(y, self.k_width)) for y in (q, k))
        if self.group > 1:
            q, k = (y.repeat_interleave(self.group, 1) for y in (q, k))
        beta = torch.sigmoid(self.beta(x).float()) * (2.0 if self.negative else 1.0)
        out, s = ops.scan(
            q,
            k,
            heads_of(v, self.v_width),
            decay=self.decay(x),
            beta=beta.mT,
            state=state.s,
            valid=valid,
        )
        return self.readout(out, x), replace(state, s=s, conv=(conv,))


def unit(x: Tensor) -> Tensor:
    """x (…, width) with length 1, or less where it is next to nothing."""
    wide = x.float()
    return (wide * (wide.square().sum(-1, keepdim=True) + _EPS).rsqrt()).to(x.dtype)
