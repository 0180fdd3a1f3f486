"""Retentive Network: A Successor to Transformer for Large Language Models (2023)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import heads_of, rotary
from foveate.nn._linear import Readout, head_width
from foveate.nn._recurrent import Recurrent
from foveate.registry import Card, register


@register(
    Card(
        name="retnet",
        title="Retentive Network: A Successor to Transformer for Large Language Models",
        year=2023,
        claim="attention that decays with distance trains in parallel and decodes in constant time",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D²) time",
        decoding="a state of heads · K · V numbers",
        confidence="high; with plain rotations, not those of xPos",
        small={"dim": 32, "heads": 4},
    )
)
class RetNet(Recurrent):
    """o_t = Σ_{s≤t} γ_h^{t-s} (q_t·k_s) v_s / sqrt(K), γ_h = 1 - 2^(-5-h) of head h from 0.

    Queries and keys rotate by their positions with base `theta` (None: not at all). Keys have
    `expand_k` of dim channels over all heads, values `expand_v`. Raises ValueError for sizes that
    do not divide and for rotating keys of odd width.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        theta: float | None = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.k_width, self.v_width = (head_width(dim, heads, n) for n in (expand_k, expand_v))
        if theta is not None and self.k_width % 2:
            raise ValueError(f"keys that rotate must have an even width, got {self.k_width}")
        self.theta = theta
        self.log_decay = tuple(math.log1p(-(2.0 ** (-5 - h))) for h in range(heads))
        self.q, self.k = (
            nn.Linear(dim, heads * self.k_width, bias=False, **made) for _ in range(2)
        )
        self.v = nn.Linear(dim, heads * self.v_width, bias=False, **made)
        self.readout = Readout(dim, heads, self.v_width, **made)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Retention."""
        q, k = (heads_of(y, self.k_width) for y in (self.q(x), self.k(x)))
        if self.theta is not None:
            at = state.pos[:, None] + torch.arange(x.shape[1], device=x.device)
            tables = rotary(at, self.k_width, self.theta)
            q, k = (ops.rope(y, *tables) for y in (q, k))
        v = heads_of(self.v(x), self.v_width)
        decay = torch.tensor(self.log_decay, device=x.device)
        out, s = ops.scan(q, k, v, decay=decay, state=state.s, valid=valid)
        return self.readout(out, x), replace(state, s=s)
