"""Fast Transformer Decoding: One Write-Head is All You Need (2019, paper 209)."""

from __future__ import annotations

from typing import Any

import torch

from foveate.nn._attention import Projections
from foveate.nn.dense.softmax_attention import SoftmaxAttention
from foveate.registry import PATTERNS, Card, register


@register(
    Card(
        name="mqa",
        title="Fast Transformer Decoding: One Write-Head is All You Need",
        year=2019,
        paper=209,
        claim="query heads that share one key and value head decode far faster, at little loss",
        kind="module",
        family="decode",
        patterns=PATTERNS,
        pretrained="fine-tune",
        cost="O(L²·D) time; a cache of kv_heads / heads of that of full heads",
        decoding="keys and values of kv_heads heads",
        confidence="high",
        small={"dim": 32, "heads": 4, "kv_heads": 2, "theta": 10_000.0},
    )
)
class MQA(SoftmaxAttention):
    """Attention whose `heads` query heads share `kv_heads` key and value heads, 1 by default.

    Query head h reads kv head h // (heads / kv_heads): `kv_heads` = `heads` is multi-head, anything
    between grouped-query attention. With `theta` heads rotate by their positions. `head_dim`
    None is dim / heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int = 1,
        *,
        head_dim: int | None = None,
        theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, kv_heads, head_dim=head_dim, theta=theta, **made)

    @classmethod
    def converted(
        cls, weights: Projections, heads: int, kv_heads: int = 1, *, theta: float | None = None
    ) -> MQA:
        """A layer of fewer kv heads from a trained one, each the mean of those it replaces.

        Raises ValueError when the trained kv heads do not divide into `kv_heads` groups.
        """
        width, dim = weights.q.shape[0] // heads, weights.q.shape[1]
        if weights.k.shape[0] % (kv_heads * width):
            raise ValueError(
                f"{weights.k.shape[0] // width} trained kv heads do not divide into {kv_heads}"
            )
        pooled = {
            name: getattr(weights, name).view(kv_heads, -1, width, dim).mean(1).flatten(0, 1)
            for name in ("k", "v")
        }
        made: dict[str, Any] = {"device": weights.q.device, "dtype": weights.q.dtype}
        layer = cls(dim, heads, kv_heads, head_dim=width, theta=theta, **made)
        layer.load(weights._replace(**pooled))
        return layer
