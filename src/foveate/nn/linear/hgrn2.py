"""HGRN2: Gated Linear RNNs with State Expansion (2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate import ops
from foveate.nn._attention import heads_of
from foveate.nn._linear import JointReadout, head_width
from foveate.nn.linear._lower_bound import Bounded, LowerBound
from foveate.registry import Card, register


@register(
    Card(
        name="hgrn2",
        title="HGRN2: Gated Linear RNNs with State Expansion",
        year=2024,
        claim="what a gate does not keep is the key of an outer product: a larger state without "
        "more parameters recalls more",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D²) time",
        decoding="a state of D · K numbers, K the width of a head",
        confidence="high",
        small={"dim": 32, "heads": 4, "index": 1, "layers": 3},
    )
)
class HGRN2(Bounded):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) v_tᵀ, o_t = S_tᵀ SiLU(q_t) / sqrt(K).

    f is a sigmoid of the input above a lower bound, which is 0 in layer 0 and rises with the
    layer's index; all layers of a model learn the bounds together. Fewer heads have larger states.
    Raises ValueError for sizes that do not divide and an index that is not below `layers`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        index: int = 0,
        layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width = head_width(dim, heads)
        self.q, self.forget, self.v = (nn.Linear(dim, dim, bias=False, **made) for _ in range(3))
        self.bound = LowerBound(dim, index, layers, **made)
        self.readout = JointReadout(dim, dim, gate=None, **made)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The recurrence; the norm is over all heads together."""
        keep = self.bound(self.forget(x))
        k = -torch.expm1(keep).to(x.dtype)
        q, k, v, keep = (heads_of(y, self.width) for y in (silu(self.q(x)), k, self.v(x), keep))
        out, s = ops.scan(q, k, v, decay=keep, side="key", state=state.s, valid=valid)
        return self.readout(out, x), replace(state, s=s)
