"""Simple Linear Attention Language Models Balance the Recall-Throughput Tradeoff (2024, paper 282).

The model of the paper is a pattern: `"based, softmax_attention:window=64"`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate import ops
from foveate.nn._linear import LinearAttention
from foveate.registry import PATTERNS, Card, register


@register(
    Card(
        name="based",
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        year=2024,
        paper=282,
        claim="the exponential's Taylor polynomial of few channels, beside a small window, recalls "
        "as much as its state is large",
        kind="module",
        family="linear",
        patterns=PATTERNS,
        pretrained="scratch",
        cost="O(L·K²·D) time, K query channels a head",
        decoding="a state of heads · F · (D + 1) numbers, F = 1 + K + K(K + 1)/2: 153 for K = 16",
        confidence="high",
        small={"dim": 32, "heads": 4, "qk_width": 8},
    )
)
class Based(LinearAttention):
    """Attention with weights 1 + s + s²/2, s = q·k / sqrt(K), of narrow queries and keys.

    `qk_width` is K, the channels of a query or key head; values have dim / heads. Nothing says
    where a token is: a short window beside it does. Raises ValueError for sizes that do not divide.
    """

    eps = 1e-12

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qk_width: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads, qk_width=qk_width, device=device, dtype=dtype)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """1, the channels, and their distinct products."""
        taylor = ops.feature_map("taylor2")
        return taylor(q), taylor(k)
