"""Gated Linear Attention Transformers with Hardware-Efficient Training (2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from foveate import ops
from foveate.nn._attention import heads_of
from foveate.nn._linear import Readout, head_width
from foveate.nn._recurrent import Recurrent
from foveate.registry import Card, register


@register(
    Card(
        name="gla",
        title="Gated Linear Attention Transformers with Hardware-Efficient Training",
        year=2023,
        claim="a decay of every key channel that depends on the input forgets what is not needed",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D²) time",
        decoding="a state of heads · K · V numbers",
        confidence="high",
        small={"dim": 32, "heads": 4},
    )
)
class GLA(Recurrent):
    """S_t = diag(a_t) S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t / sqrt(K).

    a is a sigmoid of the input, through `rank` channels, to the power of 1 / `normalizer`. Keys
    have `expand_k` of dim channels over all heads, values `expand_v`. Raises ValueError for sizes
    that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        rank: int = 16,
        normalizer: float = 16.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if normalizer <= 0:
            raise ValueError(f"normalizer must be above 0, got {normalizer}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.k_width, self.v_width = (head_width(dim, heads, n) for n in (expand_k, expand_v))
        self.normalizer, keys = normalizer, heads * self.k_width
        self.q, self.k = (nn.Linear(dim, keys, bias=False, **made) for _ in range(2))
        self.v = nn.Linear(dim, heads * self.v_width, bias=False, **made)
        narrow = nn.Linear(dim, ops.check_block("rank", rank), bias=False, **made)
        self.gate = nn.Sequential(narrow, nn.Linear(rank, keys, **made))
        self.readout = Readout(dim, heads, self.v_width, **made)

    def decay(self, x: Tensor) -> Tensor:
        """log a (B, L, heads · K) of x (B, L, dim)."""
        return logsigmoid(self.gate(x).float()) / self.normalizer

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The recurrence."""
        q, k, decay = (heads_of(y, self.k_width) for y in (self.q(x), self.k(x), self.decay(x)))
        v = heads_of(self.v(x), self.v_width)
        out, s = ops.scan(q, k, v, decay=decay, side="key", state=state.s, valid=valid)
        return self.readout(out, x), replace(state, s=s)
