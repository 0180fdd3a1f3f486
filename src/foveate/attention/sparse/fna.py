"""Faster Neighborhood Attention (2024, paper 142)."""

from __future__ import annotations

from dataclasses import dataclass

from foveate import ops
from foveate.attention.sparse._grid import TiledGrid, per_axis
from foveate.ops import Mask
from foveate.registry import Card, register


@register(
    Card(
        name="fna",
        title="Faster Neighborhood Attention: Reducing the O(n²) Cost of Self Attention at the "
        "Threadblock Level",
        year=2024,
        paper=142,
        claim="neighborhood attention in tiles needs neither the weights nor the neighborhoods in "
        "memory and is several times faster than gathering them",
        kind="attention",
        family="sparse",
        patterns=("noncausal self",),
        pretrained="approximate",
        phases=("prefill",),
        cost="O(L·(tile + window)·D) time, both counted in tokens; O(L·D) memory",
        decoding="none: a grid is attended to as a whole",
        confidence="high: rules of the authors' library; the relative bias of its unfused form "
        "is left out",
        small={"shape": (9, 17), "text": 4, "window": (3, 7), "dilation": (1, 2), "block": 16},
        full={"window": (9, 17), "dilation": 1},
        exempt={
            "left padding": "a grid that lacks some of its tokens has another shape",
            "right padding": "a grid that lacks some of its tokens has another shape",
        },
    )
)
@dataclass(frozen=True, kw_only=True)
class FNA(TiledGrid):
    """Every token sees the `window` tokens per axis around itself, shifted inwards at borders.

    With `dilation` t these are every t-th token. On `causal_axes` windows end at the query and
    are clipped. Models trained with neighborhood attention run exactly so.
    """

    window: int | tuple[int, ...] = 7
    dilation: int | tuple[int, ...] = 1
    causal_axes: tuple[int, ...] = ()

    def rule(self) -> Mask:
        """The neighborhood."""
        return ops.neighborhood(
            self.shape,
            self.window,
            dilation=self.dilation,
            causal=per_axis(self.causal_axes, self.shape),
            start=self.start,
            tile=self.tile or None,
        )
