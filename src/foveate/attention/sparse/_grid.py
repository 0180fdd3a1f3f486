"""Patterns on the grid of an image or a video, with text tokens beside it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Call, Pattern, Result
from foveate.ops import Mask


@dataclass(frozen=True, kw_only=True)
class GridPattern(Pattern):
    """A rule on the tokens of a grid; the `text` tokens beside it see and are seen by all.

    `shape` is (frames, height, width), (height, width) or (length,); tokens lie row-major. Text
    comes after the grid, or before it if the class is `text_first`.
    """

    text_first: ClassVar[bool] = False

    shape: tuple[int, ...] = (64, 64)
    text: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.shape) <= 3:
            raise ValueError(f"shape must have 1 to 3 axes, got {self.shape}")
        for size in self.shape:
            ops.check_block("shape", size)
        if self.text < 0:
            raise ValueError(f"text must be at least 0, got {self.text}")
        self.rule()

    @property
    def start(self) -> int:
        """Position of the grid's first token."""
        return self.text if self.text_first else 0

    def rule(self) -> Mask:
        """Which tokens of the grid see each other; refuses options that do not fit together."""
        raise NotImplementedError

    def mask(self, q_len: int, k_len: int, call: Call) -> Mask:
        """The rule, and the text."""
        size = prod(self.shape)
        if k_len != size + self.text:
            raise ValueError(
                f"a grid of shape {self.shape} and {self.text} text tokens are "
                f"{size + self.text} keys, got {k_len}"
            )
        if not self.text:
            return self.rule()
        first = 0 if self.text_first else size
        return self.rule() | ops.global_tokens(first, first + self.text)


@dataclass(frozen=True, kw_only=True)
class TiledGrid(GridPattern):
    """A grid pattern computed tile by tile, so that a block of tokens is a box of the grid.

    `tile` says how, and changes the cost only: its tokens must make up a block, () is row by row.
    """

    tile: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile and self.block % prod(self.tile):
            raise ValueError(
                f"block must be a multiple of the {prod(self.tile)} tokens of a tile, "
                f"got {self.block}"
            )

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Attention with the tokens in tile order, put back into theirs."""
        if not self.tile:
            return super().compute(q, k, v, call)
        if call.mask is not None or q.shape[2] != k.shape[2]:
            # Other masks and chunks of queries know positions in row-major order only.
            return dataclasses.replace(self, tile=()).compute(q, k, v, call)
        order = torch.arange(prod(self.shape) + self.text)
        inside = slice(self.start, self.start + prod(self.shape))
        order[inside] = order[inside][ops.tile_order(self.shape, self.tile)]
        if len(order) != k.shape[2]:
            self.mask(q.shape[2], k.shape[2], call)  # says what does not fit
        order = order.to(q.device)
        q, k, v = (x[:, :, order] for x in (q, k, v))
        found, back = super().compute(q, k, v, call), order.argsort()
        lse = None if found.lse is None else found.lse[:, :, back]
        return Result(found.out[:, :, back], lse, found.layout)


def per_axis(axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Which axes of a grid are among `axes`; ValueError for an axis that it does not have."""
    if wrong := [axis for axis in axes if not 0 <= axis < len(shape)]:
        raise ValueError(f"causal_axes must be axes of the grid {shape}, got {wrong[0]}")
    return tuple(axis in axes for axis in range(len(shape)))
