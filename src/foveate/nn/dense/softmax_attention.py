"""Softmax attention as a layer: what every other sequence layer is held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.nn._attention import AttentionLayer, KeyValues
from foveate.ops import Mask
from foveate.registry import PATTERNS, Card, register


@register(
    Card(
        name="softmax_attention",
        title="Attention Is All You Need",
        year=2017,
        claim="every token reads every other, at a cost that grows with their number",
        kind="module",
        family="dense",
        patterns=PATTERNS,
        pretrained="exact",
        cost="O(L²·D) time; with a window w O(L·w·D)",
        decoding="keys and values of all tokens, or of the last `window`",
        confidence="high",
        small={"dim": 32, "heads": 4, "theta": 10_000.0},
    )
)
class SoftmaxAttention(AttentionLayer):
    """Multi-head attention; with `window` to the last `window` tokens, the token itself included.

    `kv_heads` None is one for each head, fewer are shared by consecutive heads. With `theta` heads
    rotate by their positions. `head_dim` None is dim / heads. Raises ValueError for sizes that do
    not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        window: int | None = None,
        head_dim: int | None = None,
        theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, kv_heads, head_dim=head_dim, theta=theta, **made)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        self.window = None if window is None else ops.check_block("window", window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask | None) -> Tensor:
        """Attention within the window, if there is one."""
        if self.window is not None:
            near = ops.window(self.window)
            mask = near if mask is None else near & mask
        return ops.attend(q, k, v, causal=causal, mask=mask)

    def kept(self, keys: Tensor, values: Tensor, first: int) -> KeyValues:
        """Those that the next token can see."""
        over = 0 if self.window is None else max(0, keys.shape[2] - self.window + 1)
        if over:  # copies: a view would hold on to all of them
            keys, values = keys[:, :, over:].clone(), values[:, :, over:].clone()
        return KeyValues(keys, values, first + over)
