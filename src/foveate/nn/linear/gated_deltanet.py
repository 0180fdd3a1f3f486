"""Gated Delta Networks: Improving Mamba2 with Delta Rule (2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from foveate import ops
from foveate.nn._attention import heads_of
from foveate.nn._linear import Readout, ShortConv, decay_rates, head_width, step_bias
from foveate.nn._recurrent import Recurrent
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
        small={"dim": 32, "heads": 4, "expand_k": 1.0, "expand_v": 1.0},
    )
)
class GatedDeltaNet(Recurrent):
    """S_t = (I - β_t k_t k_tᵀ) exp(g_t) S_{t-1} + β_t k_t v_tᵀ, o_t = S_tᵀ q_t / sqrt(K).

    q, k and v pass a causal convolution of `conv` tokens and SiLU, q and k have length 1; β is a
    sigmoid of the input (doubled where `negative`, so that a state may change sign), g =
    -A softplus(x W + b). Keys have `expand_k` of dim channels over all heads, values `expand_v`.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        conv: int = 4,
        negative: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.k_width, self.v_width = (head_width(dim, heads, n) for n in (expand_k, expand_v))
        self.negative = negative
        sizes = (heads * self.k_width, heads * self.k_width, heads * self.v_width)
        self.qkv = nn.Linear(dim, sum(sizes), bias=False, **made)
        self.convs = ShortConv(sum(sizes), conv, **made)
        self.sizes = sizes
        self.beta, self.rate = (nn.Linear(dim, heads, bias=False, **made) for _ in range(2))
        self.log_a = decay_rates(heads, 0.0, 16.0, **made)
        self.rate_bias = step_bias(heads, **made)
        self.readout = Readout(dim, heads, self.v_width, **made)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The gated delta rule."""
        mixed, conv = self.convs(self.qkv(x), valid, *state.conv)
        widths = (self.k_width, self.k_width, self.v_width)
        q, k, v = (
            heads_of(y, width) for y, width in zip(mixed.split(self.sizes, -1), widths, strict=True)
        )
        beta = torch.sigmoid(self.beta(x).float()) * (2.0 if self.negative else 1.0)
        decay = -self.log_a.float().exp() * softplus(self.rate(x).float() + self.rate_bias.float())
        out, s = ops.scan(
            normalize(q, dim=-1),
            normalize(k, dim=-1),
            v,
            decay=decay.mT,
            beta=beta.mT,
            state=state.s,
            valid=valid,
        )
        return self.readout(out, x), replace(state, s=s, conv=(conv,))
