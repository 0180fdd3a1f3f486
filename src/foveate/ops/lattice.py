"""Grids of tokens: coordinates of positions, and the boxes that ranges of positions make up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.mask import Mask, always
from foveate.ops.shapes import check_block

# A token's coordinate on every axis; or, of a tile, its lowest and highest one.
Coords = list[Tensor]
Hull = list[tuple[Tensor, Tensor]]


class Grid(NamedTuple):
    """A grid whose tokens lie tile by tile from position `start` on, row-major on both levels."""

    shape: tuple[int, ...]
    start: int
    tile: tuple[int, ...]

    @classmethod
    def of(
        cls, shape: int | tuple[int, ...], start: int, tile: tuple[int, ...] | None = None
    ) -> Grid:
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if not 1 <= len(sizes) <= 3:
            raise ValueError(f"shape must have 1 to 3 axes, got {shape}")
        for size in sizes:
            check_block("shape", size)
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        tile = sizes if tile is None else tile
        if len(tile) != len(sizes) or any(
            t < 1 or n % t for n, t in zip(sizes, tile, strict=False)
        ):
            raise ValueError(f"tile must divide the grid {sizes} on every axis, got {tile}")
        return cls(sizes, start, tile)

    @property
    def tiles(self) -> list[int]:
        """Tiles on every axis."""
        return [n // t for n, t in zip(self.shape, self.tile, strict=True)]

    def split(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Number of the tile that holds a position, and the place in it."""
        at = (pos - self.start).clamp(0, prod(self.shape) - 1)
        if self.tile == self.shape:
            return torch.zeros_like(at), at
        return at // prod(self.tile), at % prod(self.tile)

    def coords(self, pos: Tensor) -> Coords:
        """Coordinates of positions; those off the grid are moved onto it."""
        number, place = self.split(pos)
        if self.tile == self.shape:
            return _unravel(place, self.shape)
        levels = zip(
            _unravel(number, self.tiles), self.tile, _unravel(place, self.tile), strict=True
        )
        return [i * t + j for i, t, j in levels]

    def hull(self, lo: Tensor, hi: Tensor) -> Hull:
        """On every axis the lowest and highest coordinate of the positions lo to hi."""
        (first, lo), (last, hi) = self.split(lo), self.split(hi)
        several = first != last  # of these all is taken
        lo = torch.where(several, 0, lo)
        hi = torch.where(several, prod(self.tile) - 1, hi)
        levels = zip(
            _spans(first, last, self.tiles), self.tile, _spans(lo, hi, self.tile), strict=True
        )
        return [(i * t + a, j * t + b) for (i, j), t, (a, b) in levels]

    def boxes(self, lo: Tensor, hi: Tensor) -> list[tuple[Hull, Tensor]]:
        """The positions lo to hi as boxes, and for which elements each box is there."""
        sizes = self.shape if self.tile == self.shape else (*self.tiles, *self.tile)
        lo, end = lo - self.start, hi - self.start + 1
        pieces = []
        for n in range(len(sizes) - 1, 0, -1):
            row = prod(sizes[n:])
            # What is left of a row at either end; the rest is whole rows.
            head = torch.minimum((lo + row - 1) // row * row, end)
            tail = torch.maximum(end // row * row, head)
            pieces += [(lo, head), (tail, end)]
            lo, end = head, tail
        pieces.append((lo, end))
        there = [(a, b, a < b) for a, b in pieces if bool((a < b).any())]
        return [
            (self.hull(a + self.start, torch.maximum(a, b - 1) + self.start), some)
            for a, b, some in there
        ]

    def mask(
        self,
        seen: Callable[[Coords, Coords], Tensor],
        certain: Callable[[Hull, Hull], tuple[Tensor, Tensor]],
        name: str,
    ) -> Mask:
        """The mask of a rule on coordinates, and of the truth about boxes of them.

        certain says of hulls what bounds say of tiles, and is exact for boxes.
        """
        end = self.start + prod(self.shape)

        def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inside = (q >= self.start) & (q < end) & (k >= self.start) & (k < end)
            return seen(self.coords(q), self.coords(k)) & inside

        def truth(*tile: Tensor) -> tuple[Tensor, Tensor]:
            """About tiles of any form, box by box."""
            q_lo, q_hi, k_lo, k_hi = (x.clamp(self.start, end - 1) for x in tile)
            some = torch.zeros_like(q_lo, dtype=torch.bool)
            every = ~some
            for rows, there in self.boxes(q_lo, q_hi):
                for cols, also in self.boxes(k_lo, k_hi):
                    part_some, part_every = certain(rows, cols)
                    both = there & also
                    some |= part_some & both
                    every &= part_every | ~both
            return some, every

        def bounds(b: Tensor, h: Tensor, *tile: Tensor) -> tuple[Tensor, Tensor]:
            q_lo, q_hi, k_lo, k_hi = tile
            touched = (q_hi >= self.start) & (q_lo < end) & (k_hi >= self.start) & (k_lo < end)
            inside = (q_lo >= self.start) & (q_hi < end) & (k_lo >= self.start) & (k_hi < end)
            some, every = certain(self.hull(q_lo, q_hi), self.hull(k_lo, k_hi))
            boxes = self.is_box(q_lo, q_hi) & self.is_box(k_lo, k_hi)
            unsure = touched & some & ~(every | boxes)
            some, every = (x.expand(unsure.shape).clone() for x in (some, every))
            some[unsure], every[unsure] = truth(*(x.expand(unsure.shape)[unsure] for x in tile))
            return some & touched, every & inside

        return Mask(predicate, bounds, name=name, exact=always)

    def is_box(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Whether the positions lo to hi on the grid are all that lies in their hull."""
        lo, hi = (x.clamp(self.start, self.start + prod(self.shape) - 1) for x in (lo, hi))
        sizes = [last - first + 1 for first, last in self.hull(lo, hi)]
        return reduce(mul, sizes) == hi - lo + 1


def _unravel(number: Tensor, sizes: Sequence[int]) -> Coords:
    """Coordinates of a row-major number."""
    coords = []
    for size in reversed(sizes[1:]):
        coords.append(number % size)
        number = number // size
    return [number, *reversed(coords)]


def _spans(first: Tensor, last: Tensor, sizes: Sequence[int]) -> Hull:
    """On every axis the lowest and highest coordinate of the row-major numbers first to last."""
    out = []
    for n, size in enumerate(sizes):
        a, b = first // prod(sizes[n + 1 :]), last // prod(sizes[n + 1 :])
        within = a // size == b // size  # else the axis wraps around on the way
        out.append((torch.where(within, a % size, 0), torch.where(within, b % size, size - 1)))
    return out
