"""Gated Delta Networks: Improving Mamba2 with Delta Rule (2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from foveate.nn._linear import decay_rates, step_bias
from foveate.nn.linear._delta import DeltaRule
from foveate.registry import Card, register


@register(
    Card(
        name="gated_deltanet",
        title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        year=2024,
        claim="a state that forgets at once and overwrites with care recalls more than either",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D²) time",
        decoding="a state of heads · K · V numbers and the last inputs of three convolutions",
        confidence="high",
        small={"dim": 32, "heads": 2, "v_heads": 4, "expand_k": 1.0, "expand_v": 1.0},
    )
)
class GatedDeltaNet(DeltaRule):
    """S_t = (I - β_t k_t k_tᵀ) exp(g_t) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t / sqrt(K).

    q, k and v pass a causal convolution of `conv` tokens and SiLU, q and k have length 1; β is a
    sigmoid of the input (doubled where `negative`, so that a state may change sign), g =
    -A softplus(x W + b). Keys have `expand_k` of dim channels over all heads, values `expand_v`;
    v_heads (None: as many as heads) are in groups that share a key head. Raises ValueError for
    sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        v_heads: int | None = None,
        *,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        conv: int = 4,
        negative: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            heads,
            v_heads,
            expand_k=expand_k,
            expand_v=expand_v,
            conv=conv,
            negative=negative,
            gate=True,
            **made,
        )
        self.rate = nn.Linear(dim, self.v_heads, bias=False, **made)
        self.log_a = decay_rates(self.v_heads, 0.0, 16.0, **made)
        self.rate_bias = step_bias(self.v_heads, **made)

    def decay(self, x: Tensor) -> Tensor:
        """g of every value head."""
        rate = softplus(self.rate(x).float() + self.rate_bias.float())
        return (-self.log_a.float().exp() * rate).mT
