"""Radial Attention: O(n log n) Sparse Attention with Energy Decay (2025, paper 39)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from foveate import ops
from foveate.attention.sparse._grid import GridPattern
from foveate.ops import Mask
from foveate.registry import Card, register


@register(
    Card(
        name="radial",
        title="Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video "
        "Generation",
        year=2025,
        paper=39,
        claim="a spatial window that halves as the distance in time doubles keeps what matters "
        "in a video at O(n log n) cost",
        kind="attention",
        family="sparse",
        patterns=("noncausal self",),
        pretrained="approximate",
        phases=("prefill",),
        cost="O(L·tokens per frame·log(frames)·D) time, O(L·D) memory",
        decoding="none: a video is attended to as a whole",
        confidence="medium: the paper's rule on tokens; the released code works on blocks, with "
        "constants of its own",
        small={"shape": (9, 17), "text": 4, "block": 16},
        exempt={
            "full budget = dense": "has no budget: the video's shape says what is read",
            "left padding": "a video that lacks some of its tokens has another shape",
            "right padding": "a video that lacks some of its tokens has another shape",
            "softcap": "has no budget at which it equals dense attention",
        },
    )
)
@dataclass(frozen=True, kw_only=True)
class Radial(GridPattern):
    """Frames at distance d see each other through a window of tokens / 2^floor(log2 d).

    Distance inside a frame is that of row-major numbers. Where that leaves less than a token, the
    same place is seen in every ceil(2^floor(log2 d) / tokens)-th frame. With `sink` all see the
    first frame. Text comes after the video; the shape is (frames, height, width) or
    (frames, tokens).
    """

    shape: tuple[int, ...] = (16, 32, 32)
    sink: bool = True

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3):
            raise ValueError(
                f"shape must be (frames, height, width) or (frames, tokens), got {self.shape}"
            )
        super().__post_init__()

    def rule(self) -> Mask:
        """The window by distance in time."""
        return ops.radial(self.shape[0], prod(self.shape[1:]), sink=self.sink)
