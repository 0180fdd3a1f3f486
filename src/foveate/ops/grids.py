"""Masks of strides and of 1-D to 3-D grids, whose tokens lie in row-major order."""

from __future__ import annotations

from functools import reduce
from math import prod
from operator import add, and_
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from foveate.ops.lattice import Coords, Grid, Hull
from foveate.ops.mask import Mask, always, window
from foveate.ops.shapes import check_block

T = TypeVar("T")


def strided(stride: int, *, local: int = 1, block: int = 1, offset: int | Tensor = 0) -> Mask:
    """Every `stride`-th block of `block` keys, and the blocks at distance below `local`.

    Key block J is seen by query block I when |I - J| < local or (J + offset) % stride == 0: strides
    are absolute, so that a key that fell out of sight never returns. `offset` (heads,) shifts the
    heads apart. Raises ValueError for sizes below 1.
    """
    for name, value in (("stride", stride), ("local", local), ("block", block)):
        check_block(name, value)
    if isinstance(offset, Tensor) and (offset.dim() != 1 or offset.is_floating_point()):
        raise ValueError(f"offset per head must be a 1-D integer tensor, got {offset}")
    if not isinstance(offset, Tensor | int):
        raise TypeError(f"offset must be an integer, got {offset!r}")
    band = window(local)

    def shift(h: Tensor) -> int | Tensor:
        return offset.to(h.device)[h] if isinstance(offset, Tensor) else offset

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return band(b, h, q // block, k // block) | ((k // block + shift(h)) % stride == 0)

    def bounds(b: Tensor, h: Tensor, *tile: Tensor) -> tuple[Tensor, Tensor]:
        q_lo, q_hi, k_lo, k_hi = (x // block for x in tile)
        some, every = band.bounds(b, h, q_lo, q_hi, k_lo, k_hi)
        hits = (k_hi + shift(h)) // stride - (k_lo + shift(h) - 1) // stride
        return some | (hits > 0), every | (hits == k_hi - k_lo + 1)

    heads = offset.numel() if isinstance(offset, Tensor) else 1
    return Mask(predicate, bounds, heads=heads, name=f"strided({stride})")


def neighborhood(
    shape: int | tuple[int, ...],
    window: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    start: int = 0,
    tile: tuple[int, ...] | None = None,
) -> Mask:
    """Each token sees `window` tokens per axis around it on a grid of 1 to 3 axes.

    Windows are shifted at borders, not clipped, so every query sees exactly `window` keys per axis;
    the `stride` queries of a group share one window; with `dilation` t only every t-th token
    counts; on a causal axis the window ends at the query (and is clipped). Options may be given per
    axis; the grid begins at position `start`, and what lies off it neither sees nor is seen; with
    `tile` its tokens lie in the order of `tile_order`. (Generalized neighborhood attention, 2025;
    with stride 1 that of fused neighborhood attention, 2024.) Raises ValueError where the rules
    stride <= window and window * dilation <= length are broken.
    """
    grid = Grid.of(shape, start, tile)
    axes = [
        _Axis(*sizes)
        for sizes in zip(
            grid.shape,
            _per_axis("window", window, grid),
            _per_axis("stride", stride, grid),
            _per_axis("dilation", dilation, grid),
            _per_axis("causal", causal, grid),
            strict=True,
        )
    ]
    for axis in axes:
        axis.check()

    def seen(q: Coords, k: Coords) -> Tensor:
        return reduce(and_, [axis.seen(i, j) for axis, i, j in zip(axes, q, k, strict=True)])

    def certain(q: Hull, k: Hull) -> tuple[Tensor, Tensor]:
        parts = [axis.certain(i, j) for axis, i, j in zip(axes, q, k, strict=True)]
        return reduce(and_, [some for some, _ in parts]), reduce(
            and_, [every for _, every in parts]
        )

    return grid.mask(seen, certain, f"neighborhood({shape}, {window})")


def disc(
    shape: int | tuple[int, ...],
    radius: float,
    *,
    start: int = 0,
    tile: tuple[int, ...] | None = None,
) -> Mask:
    """Each token sees the tokens at Euclidean distance below `radius` on a grid of 1 to 3 axes.

    The disc is clipped at borders; the grid begins at position `start`, what lies off it neither
    sees nor is seen; with `tile` its tokens lie in the order of `tile_order`. (CLEAR, 2024.)
    """
    grid = Grid.of(shape, start, tile)
    if not radius > 0:
        raise ValueError(f"radius must be above 0, got {radius}")

    def seen(q: Coords, k: Coords) -> Tensor:
        return reduce(add, [(i - j) ** 2 for i, j in zip(q, k, strict=True)]) < radius**2

    def certain(q: Hull, k: Hull) -> tuple[Tensor, Tensor]:
        gaps = [_distances(i, j) for i, j in zip(q, k, strict=True)]
        near, far = (reduce(add, [gap[n] ** 2 for gap in gaps]) for n in (0, 1))
        return near < radius**2, far < radius**2

    return grid.mask(seen, certain, f"disc({shape}, {radius})")


def radial(frames: int, tokens_per_frame: int, *, sink: bool = True, start: int = 0) -> Mask:
    """Video tokens, frame by frame: the spatial window halves as the temporal distance doubles.

    With e = floor(log2(max(|i - j|, 1))), token a of frame i sees token c of frame j when
    (|a - c| + 1) * 2^e <= P, or when a == c and |i - j| is a multiple of ceil(2^e / P), or with
    `sink` when j is frame 0. The video begins at position `start`, what lies off it neither sees
    nor is seen. (Radial Attention, 2025.)
    """
    size = check_block("tokens_per_frame", tokens_per_frame)
    grid = Grid.of((check_block("frames", frames), size), start)
    stretch = torch.tensor([1 << (max(d, 1).bit_length() - 1) for d in range(frames + 1)])
    lined = torch.arange(frames + 1) % -(-stretch // size) == 0
    # Frames at distance below d that see each other at one and the same place.
    lines = torch.nn.functional.pad(lined.long().cumsum(0), (1, 0))

    def seen(q: Coords, k: Coords) -> Tensor:
        (i, a), (j, c) = q, k
        apart, gap = (i - j).abs(), (a - c).abs()
        near = (gap + 1) * stretch.to(gap.device)[apart] <= size
        line = (gap == 0) & lined.to(gap.device)[apart]
        return near | line | (j == 0) if sink else near | line

    def certain(q: Hull, k: Hull) -> tuple[Tensor, Tensor]:
        first, last = k[0]
        others = (first.clamp_min(1), last.clamp_min(1)) if sink else (first, last)
        apart_lo, apart_hi = _distances(q[0], others)
        gap_lo, gap_hi = _distances(q[1], k[1])
        far, before = stretch.to(gap_lo.device), lines.to(gap_lo.device)
        hits = before[apart_hi + 1] - before[apart_lo]
        some = ((gap_lo + 1) * far[apart_lo] <= size) | ((gap_lo == 0) & (hits > 0))
        every = (gap_hi + 1) * far[apart_hi] <= size
        every = every | ((gap_hi == 0) & (hits == apart_hi - apart_lo + 1))
        return (some | (first == 0), every | (last == 0)) if sink else (some, every)

    return grid.mask(seen, certain, f"radial({frames}, {tokens_per_frame})")


def global_tokens(start: int, end: int) -> Mask:
    """Tokens at positions [start, end) see all others and are seen by all others."""
    if not 0 <= start <= end:
        raise ValueError(f"global tokens need 0 <= start <= end, got {start} and {end}")

    def inside(pos: Tensor) -> Tensor:
        return (start <= pos) & (pos < end)

    def bounds(b: Tensor, h: Tensor, *tile: Tensor) -> tuple[Tensor, Tensor]:
        q_lo, q_hi, k_lo, k_hi = tile
        touched = ((q_lo < end) & (q_hi >= start)) | ((k_lo < end) & (k_hi >= start))
        every = (inside(q_lo) & inside(q_hi)) | (inside(k_lo) & inside(k_hi))
        return touched & (start < end), every

    return Mask(
        lambda b, h, q, k: inside(q) | inside(k),
        bounds,
        name=f"global_tokens({start}, {end})",
        exact=always,
    )


def tile_order(shape: int | tuple[int, ...], tile: tuple[int, ...]) -> Tensor:
    """The tokens of a grid tile by tile: row-major numbers (prod(shape),), ascending in each tile.

    Neighbours on several axes then lie close together, so that few blocks hold a neighborhood.
    Raises ValueError where a tile does not divide the grid.
    """
    grid = Grid.of(shape, 0, tile)
    order = torch.zeros(prod(grid.shape), dtype=torch.long)
    for at, size in zip(grid.coords(torch.arange(len(order))), grid.shape, strict=True):
        order = order * size + at
    return order


class _Axis(NamedTuple):
    """One axis of a neighborhood."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    def check(self) -> None:
        """Refuse sizes that leave some query without its window."""
        for name in ("window", "stride", "dilation"):
            check_block(name, getattr(self, name))
        if self.window * self.dilation > self.length:
            raise ValueError(
                f"window * dilation must fit into the axis of length {self.length}, "
                f"got window {self.window} and dilation {self.dilation}"
            )
        if self.stride > self.window:
            raise ValueError(f"stride must be at most window {self.window}, got {self.stride}")

    def reach(self, i: Tensor, length: Tensor | int) -> tuple[Tensor, Tensor]:
        """First and last key of query i on an undilated axis; both grow with i and length."""
        group = i // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(group + self.stride - 1, torch.as_tensor(length - 1))
            return (leader - self.window + 1).clamp_min(0), i
        leader = torch.minimum(group + self.stride // 2, torch.as_tensor(length - 1))
        first = (leader - self.window // 2).clamp_min(0)
        first = torch.minimum(first, torch.as_tensor(length - self.window))
        return first, first + self.window - 1

    def seen(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query coordinate i sees key coordinate j."""
        t = self.dilation
        residue = i % t
        first, last = self.reach(i // t, (self.length - residue + t - 1) // t)
        return (j % t == residue) & (first <= j // t) & (j // t <= last)

    def certain(self, i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What is certain of query coordinates i[0] to i[1] and key coordinates j[0] to j[1]."""
        t, some = self.dilation, torch.zeros((), dtype=torch.bool, device=i[0].device)
        for residue in range(t):
            # First and last member of the residue class in a range.
            (i_lo, i_hi), (j_lo, j_hi) = (
                ((lo - residue + t - 1) // t, (hi - residue) // t) for lo, hi in (i, j)
            )
            length = (self.length - residue + t - 1) // t
            first, last = self.reach(i_lo, length)[0], self.reach(i_hi, length)[1]
            some = some | ((i_lo <= i_hi) & (j_lo <= j_hi) & (first <= j_hi) & (j_lo <= last))
        if t > 1:
            return some, some & (i[0] == i[1]) & (j[0] == j[1])
        first, last = self.reach(i[1], self.length)[0], self.reach(i[0], self.length)[1]
        return some, (first <= j[0]) & (j[1] <= last)


def _per_axis(name: str, value: T | tuple[T, ...], grid: Grid) -> tuple[T, ...]:
    """An option for each axis of the grid."""
    axes = len(grid.shape)
    values = value if isinstance(value, tuple) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name} must have one value for each of the {axes} axes, got {value}")
    return values


def _distances(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Smallest and largest distance between members of two ranges."""
    least = torch.maximum(b[0] - a[1], a[0] - b[1]).clamp_min(0)
    return least, torch.maximum(b[1] - a[0], a[1] - b[0])
