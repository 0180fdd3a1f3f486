"""Hierarchically Gated Recurrent Neural Network for Sequence Modeling (2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate import ops
from foveate.nn._linear import Readout, head_width
from foveate.nn._recurrent import hidden
from foveate.nn.linear._lower_bound import Bounded, LowerBound
from foveate.registry import Card, register


@register(
    Card(
        name="hgrn",
        title="Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
        year=2023,
        claim="forget gates with lower bounds that rise with depth let upper layers remember long",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D) time beside the projections",
        decoding="a state of D numbers",
        confidence="high; the real-valued form",
        small={"dim": 32, "index": 1, "layers": 3},
    )
)
class HGRN(Bounded):
    """h_t = f_t ⊙ h_{t-1} + (1 - f_t) ⊙ SiLU(x_t W), of `expand` times dim channels.

    f is a sigmoid of the input above a lower bound, which is 0 in layer 0 and rises with the
    layer's index; all layers of a model learn the bounds together. Raises ValueError for an index
    that is not below `layers`.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 1.0,
        index: int = 0,
        layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width = head_width(dim, 1, expand)
        self.write, self.forget = (nn.Linear(dim, width, bias=False, **made) for _ in range(2))
        self.bound = LowerBound(width, index, layers, **made)
        self.readout = Readout(dim, 1, width, **made)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The recurrence, each channel for itself."""
        keep = self.bound(self.forget(x))
        new = silu(self.write(x)).float() * -torch.expm1(keep)
        if valid is not None:
            keep, new = hidden(keep, valid), hidden(new, valid)
        h, last = ops.elementwise_scan(new, keep, state.s)
        return self.readout(h.to(x.dtype)[:, None], x), replace(state, s=last)
