"""Attention as an RNN (2024, paper 130)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._linear import head_width
from foveate.nn._recurrent import Recurrent
from foveate.registry import Card, register


@register(
    Card(
        name="aaren",
        title="Attention as an RNN",
        year=2024,
        paper=130,
        claim="softmax attention with a query that does not depend on the input is a recurrence: "
        "constant memory and time for every new token",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D) time beside the projections",
        decoding="D values and one log-sum-exp a head",
        confidence="high",
        small={"dim": 32, "heads": 4},
    )
)
class Aaren(Recurrent):
    """o_t = Σ_{s≤t} softmax_{s≤t}(q·k_s / sqrt(D)) v_s with one learned query q for each head.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width = head_width(dim, heads)
        self.query = nn.Parameter(torch.empty(dim, **made).normal_())
        self.q, self.k, self.v, self.out = (
            nn.Linear(dim, dim, bias=False, **made) for _ in range(4)
        )

    def scores(self, x: Tensor) -> Tensor:
        """q·k / sqrt(D) (B, heads, L) in float32 of x (B, L, dim)."""
        q = self.q(self.query).float().view(-1, 1, self.width)
        return (heads_of(self.k(x), self.width).float() * q).sum(-1) * self.width**-0.5

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Running softmax averages."""
        scores = self.scores(x)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], -torch.inf)
        weight, keep, z = ops.prefix_softmax_gate(scores, state.z, dim=-1)
        new = weight[..., None] * heads_of(self.v(x), self.width)
        out, last = ops.elementwise_scan(new, keep[..., None], state.s)
        return self.out(joined_heads(out.to(x.dtype))), replace(state, s=last, z=z)
