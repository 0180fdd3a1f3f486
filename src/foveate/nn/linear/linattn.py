"""Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention (2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.nn._linear import LinearAttention
from foveate.registry import PATTERNS, Card, register


@register(
    Card(
        name="linattn",
        title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        year=2020,
        claim="without the exponential, keys and values sum up to one matrix: time is linear",
        kind="module",
        family="linear",
        patterns=PATTERNS,
        pretrained="approximate",
        cost="O(L·D²) time",
        decoding="a state of heads · D · (D + 1) numbers",
        confidence="high",
        small={"dim": 32, "heads": 4},
    )
)
class LinAttn(LinearAttention):
    """Attention with weights φ(q)·φ(k), divided by their sum where `normalize`.

    `features` names φ: elu1 (elu + 1), relu, identity … as in `ops.feature_map`; one with negative
    weights cannot be normalised. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        features: str = "elu1",
        normalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, **made)
        self.map, self.normalize = ops.feature_map(features), normalize
        if normalize and not self.map.positive:
            raise ValueError(
                f"weights of the feature map {features!r} may be negative: their sum can be 0, so "
                "they cannot be normalised; give normalize=False"
            )

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ of both; without a denominator the scale 1/sqrt(D) does not cancel."""
        scale = 1.0 if self.normalize or self.map.scaled else self.qk_width**-0.5
        return self.map(q * scale), self.map(k)
