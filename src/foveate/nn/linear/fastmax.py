"""FAST: Factorizable Attention for Speeding up Transformers (2024, paper 215)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from foveate import ops
from foveate.nn._linear import LinearAttention
from foveate.registry import PATTERNS, Card, register


@register(
    Card(
        name="fastmax",
        title="FAST: Factorizable Attention for Speeding up Transformers",
        year=2024,
        paper=215,
        claim="a polynomial in place of the exponential factorizes: softmax-like and linear",
        kind="module",
        family="linear",
        patterns=PATTERNS,
        pretrained="scratch",
        cost="O(L·D³) time at degree 2, O(L·D²) at degree 1",
        decoding="a state of heads · F · (D + 1) numbers, F = 1 + D + D(D + 1)/2 at degree 2",
        confidence="medium: the paper's normalisation from descriptions and circulated code",
        small={"dim": 32, "heads": 4},
    )
)
class Fastmax(LinearAttention):
    """Attention with weights Σ_{l≤degree} s^l / l!, s = q̂·k̂ / (temperature · sqrt(K)).

    q̂ and k̂ are standardised over the K channels of a head, token by token. Degree 2 has weights of
    1/2 at least; degree 1 has negative ones unless temperature >= sqrt(K), and is refused below.
    `qk_width` is K (None: dim / heads). Raises ValueError for other degrees and for sizes that do
    not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        degree: int = 2,
        temperature: float = 1.0,
        qk_width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads, qk_width=qk_width, device=device, dtype=dtype)
        if degree not in (1, 2):
            raise ValueError(f"degree must be 1 or 2, got {degree}")
        least = self.qk_width**0.5 if degree == 1 else 0.0
        if temperature <= 0 or temperature < least:
            raise ValueError(
                f"temperature must be above 0, and at degree 1 at least sqrt(K) = "
                f"{self.qk_width**0.5:.4g} for weights >= 0, got {temperature}"
            )
        self.temperature = temperature
        self.map = ops.feature_map(f"taylor{degree}")

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The products of channels whose sum is the polynomial."""
        q, k = (layer_norm(x, (self.qk_width,)) for x in (q, k))
        return self.map(q / self.temperature), self.map(k)
