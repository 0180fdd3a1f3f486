"""Parallelizing Linear Transformers with the Delta Rule over Sequence Length (2024, paper 283)."""

from __future__ import annotations

from typing import Any

import torch

from foveate.nn.linear._delta import DeltaRule
from foveate.registry import Card, register


@register(
    Card(
        name="deltanet",
        title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        year=2024,
        paper=283,
        claim="a state that overwrites the value of a key recalls what a sum of values blurs, and "
        "products of Householder matrices let it train in chunks",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·(C² + C·D + D²)) time in chunks of C tokens",
        decoding="a state of heads · K · V numbers and the last inputs of three convolutions",
        confidence="high",
        small={"dim": 32, "heads": 4},
    )
)
class DeltaNet(DeltaRule):
    """S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t / sqrt(K).

    q, k and v pass a causal convolution of `conv` tokens and SiLU, q and k have length 1; β is a
    sigmoid of the input (doubled where `negative`, so that a state may change sign). Keys have
    `expand_k` of dim channels over all heads, values `expand_v`; `gate` multiplies the heads by a
    SiLU of the input. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int = 4,
        negative: bool = False,
        gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            heads,
            expand_k=expand_k,
            expand_v=expand_v,
            conv=conv,
            negative=negative,
            gate=gate,
            **made,
        )
