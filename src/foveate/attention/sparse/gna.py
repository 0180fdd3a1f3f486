"""Generalized Neighborhood Attention (2025, paper 50)."""

from __future__ import annotations

from dataclasses import dataclass

from foveate import ops
from foveate.attention.sparse._grid import TiledGrid, per_axis
from foveate.ops import Mask
from foveate.registry import Card, register


@register(
    Card(
        name="gna",
        title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the "
        "Speed of Light",
        year=2025,
        paper=50,
        claim="with strides that fit the tiles, local attention saves as much time as it saves "
        "operations",
        kind="attention",
        family="sparse",
        patterns=("noncausal self",),
        pretrained="approximate",
        phases=("prefill",),
        cost="O(L·window·D) time where windows, strides and tiles fit together; O(L·D) memory",
        decoding="none: a grid is attended to as a whole",
        confidence="high: rules of the authors' library",
        small={"shape": (9, 17), "text": 4, "window": (3, 6), "stride": (1, 3), "block": 16},
        full={"window": (9, 17), "stride": 1},
        exempt={
            "left padding": "a grid that lacks some of its tokens has another shape",
            "right padding": "a grid that lacks some of its tokens has another shape",
        },
    )
)
@dataclass(frozen=True, kw_only=True)
class GNA(TiledGrid):
    """Every token sees the `window` tokens per axis around the leader of its group of `stride`.

    Windows are shifted at borders, so that they always hold `window` tokens per axis; with
    `dilation` t they take every t-th token. Stride 1 is neighborhood attention, stride = window
    is attention inside of blocks. On `causal_axes` windows end at the query and are clipped.
    """

    window: int | tuple[int, ...] = 16
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal_axes: tuple[int, ...] = ()

    def rule(self) -> Mask:
        """The neighborhood."""
        return ops.neighborhood(
            self.shape,
            self.window,
            stride=self.stride,
            dilation=self.dilation,
            causal=per_axis(self.causal_axes, self.shape),
            start=self.start,
            tile=self.tile or None,
        )
