"""Efficient Attention: Attention with Linear Complexities (2018, paper 196)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._linear import head_width, queries_last
from foveate.nn._recurrent import Recurrent
from foveate.nn.linear._position_softmax import softmax_before, softmax_everywhere
from foveate.registry import PATTERNS, Card, register


@register(
    Card(
        name="efficient_attn",
        title="Efficient Attention: Attention with Linear Complexities",
        year=2018,
        paper=196,
        claim="two softmaxes, over a query's channels and over the keys' positions, make attention "
        "linear in memory",
        kind="module",
        family="linear",
        patterns=PATTERNS,
        pretrained="scratch",
        cost="O(L·D²) time; causal with a decay per key channel",
        decoding="a state of heads · K · (D + 1) numbers",
        confidence="high",
        small={"dim": 32, "heads": 4},
    )
)
class EfficientAttn(Recurrent):
    """softmax over channels of q, times softmax over positions of k, times v: no weight is below 0.

    The weights of a query sum to 1. Causally the softmax of the keys runs over the positions so
    far. `qk_width` are the channels of a query or key head (None: dim / heads). Raises ValueError
    for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qk_width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.v_width = head_width(dim, heads)
        self.qk_width = self.v_width if qk_width is None else ops.check_block("qk_width", qk_width)
        self.q, self.k = (nn.Linear(dim, heads * self.qk_width, **made) for _ in range(2))
        self.v, self.out = (nn.Linear(dim, dim, **made) for _ in range(2))

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Softmax averages of the values so far."""
        q, k, v = self._heads(x, x)
        keys, decay, z = softmax_before(k, state.z, valid)
        out, s = ops.scan(
            q, keys, v, decay=decay, side="key", scale=1.0, state=state.s, valid=valid
        )
        return self.out(joined_heads(out)), replace(state, s=s, z=z)

    def whole(self, x: Tensor, source: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
        """Attention to a source, all of it or up to the queries' positions."""
        q, k, v = self._heads(x, source)
        if causal:
            rows = queries_last(q, k)
            keys, decay, _ = softmax_before(k, None, valid)
            out, _ = ops.scan(rows, keys, v, decay=decay, side="key", scale=1.0, valid=valid)
            out = out[:, :, -q.shape[2] :]
        else:
            keys = softmax_everywhere(k, valid)
            out = ops.linear_attention_global(q, keys, v, normalize=False)
        y: Tensor = self.out(joined_heads(out))
        return y

    def _heads(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries after their softmax, logits of the keys, and values."""
        q, k = (heads_of(y, self.qk_width) for y in (self.q(x), self.k(source)))
        return q.softmax(-1), k, heads_of(self.v(source), self.v_width)
