"""Block layouts: which key blocks each query block reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.ops.mask import Mask, causal
from foveate.ops.shapes import TileGrid, check_block, positions, query_offset, tile_positions

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Pairs of one classification step of `from_mask`: bounds its memory, not its result.
_PAIRS = 1 << 19


@dataclass(frozen=True)
class BlockLayout:
    """For every query block the key blocks it reads, in ascending order.

    indices (1|B, 1|Hkv|Hq, nQ, m) int32; row r holds counts[r] blocks, what follows is filler.
    counts (1|B, 1|Hkv|Hq, nQ) int32. block = (rows, keys) per block, lengths = (Lq, Lk).
    partial, when known, is a bool tensor like indices: True where a mask must still be applied
    inside the block. Query blocks are cut on absolute positions: with Lq < Lk the queries are the
    last Lq positions and the first block may be ragged.
    """

    indices: Tensor
    counts: Tensor
    block: tuple[int, int]
    lengths: tuple[int, int]
    partial: Tensor | None = None

    def __post_init__(self) -> None:
        nq, nk = self.grid
        if self.indices.dim() != 4 or self.indices.shape[2] != nq:
            raise ValueError(
                f"indices must be (batch, heads, {nq} query blocks, m) for lengths "
                f"{self.lengths} and block {self.block}, got {tuple(self.indices.shape)}"
            )
        if self.counts.shape != self.indices.shape[:3]:
            raise ValueError(
                f"counts must be {tuple(self.indices.shape[:3])}, got {tuple(self.counts.shape)}"
            )
        if self.partial is not None and self.partial.shape != self.indices.shape:
            raise ValueError(
                f"partial must be {tuple(self.indices.shape)} like indices, "
                f"got {tuple(self.partial.shape)}"
            )
        _check_range("indices", self.indices, nk)
        _check_range("counts", self.counts, self.indices.shape[-1] + 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of query blocks and key blocks."""
        return grid_of(self.lengths, self.block)

    @property
    def filled(self) -> Tensor:
        """Bool tensor like indices: True where an entry counts."""
        slots = torch.arange(self.indices.shape[-1], device=self.indices.device)
        return slots < self.counts[..., None]

    def to_bool(self) -> Tensor:
        """Block map (1|B, 1|H, nQ, nK), True = read."""
        nq, nk = self.grid
        out = torch.zeros(*self.indices.shape[:2], nq, nk + 1, dtype=torch.bool)
        out = out.to(self.indices.device)
        slot = torch.where(self.filled, self.indices.long(), nk)
        return out.scatter_(-1, slot, True)[..., :nk]

    def density(self, causal: bool = True) -> float:
        """Share of the visible query-key pairs that are computed, mean over batch and heads."""
        rows = _row_edges(self.lengths, self.block[0])
        q_lo, q_hi = (x.to(self.indices.device)[:, None] for x in rows)
        k_lo, k_len = self.indices.long() * self.block[1], torch.tensor(self.lengths[1])
        k_hi = (k_lo + self.block[1]).clamp_max(self.lengths[1])
        read = (_count_pairs(q_lo, q_hi, k_lo, k_hi, causal) * self.filled).sum()
        visible = _count_pairs(q_lo, q_hi, torch.zeros_like(k_len), k_len, causal).sum()
        lists = self.indices.shape[0] * self.indices.shape[1]
        return int(read) / max(int(visible) * lists, 1)

    def to_flex(self) -> BlockMask:
        """FlexAttention's `BlockMask` (blocks only; what lies inside them is up to its mask)."""
        from torch.nn.attention.flex_attention import BlockMask

        grid = TileGrid.of(*self.lengths, self.block[0])
        if grid.lead or len(set(self.block)) > 1:
            raise ValueError(
                f"FlexAttention needs square blocks and aligned queries, got blocks {self.block} "
                f"and a first block with {grid.lead} missing rows"
            )
        nk = self.grid[1]
        fill = nk - self.indices.shape[-1]
        indices = torch.nn.functional.pad(self.indices, (0, fill))
        return BlockMask.from_kv_blocks(
            self.counts.int(), indices.int(), BLOCK_SIZE=self.block, seq_lengths=self.lengths
        )


def _check_range(name: str, values: Tensor, limit: int) -> None:
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
        raise ValueError(
            f"{name} must lie in [0, {limit}), got [{int(values.min())}, {int(values.max())}]"
        )


def as_block(block: int | tuple[int, int]) -> tuple[int, int]:
    """A block size as (rows, keys); raises for sizes below 1."""
    bq, bk = (block, block) if isinstance(block, int) else block
    return check_block("block rows", bq), check_block("block keys", bk)


def grid_of(lengths: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Numbers of query and key blocks."""
    return TileGrid.of(*lengths, block[0]).tiles, -(-lengths[1] // block[1])


def visible_pairs(lengths: tuple[int, int], block: tuple[int, int], causal: bool) -> Tensor:
    """Visible query-key pairs of every block (nQ, nK), int64, without visiting the pairs."""
    q_lo, q_hi = (x[:, None] for x in _row_edges(lengths, block[0]))
    k_lo = torch.arange(-(-lengths[1] // block[1])) * block[1]
    return _count_pairs(q_lo, q_hi, k_lo, (k_lo + block[1]).clamp_max(lengths[1]), causal)


def _row_edges(lengths: tuple[int, int], rows: int) -> tuple[Tensor, Tensor]:
    """Positions of the first query of every query block and of the one after its last (nQ,)."""
    (lq, lk), grid = lengths, TileGrid.of(*lengths, rows)
    start = query_offset(lq, lk)
    lo = (torch.arange(grid.tiles) + grid.first) * rows
    return lo.clamp_min(start), (lo + rows).clamp_max(start + lq)


def _count_pairs(q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor, causal: bool) -> Tensor:
    """Visible pairs of queries [q_lo, q_hi) and keys [k_lo, k_hi), which broadcast."""
    if not causal:
        return (q_hi - q_lo) * (k_hi - k_lo)

    # The row at position p sees min(p + 1, k_hi) - min(p + 1, k_lo) keys of the block.
    def seen(k_end: Tensor) -> Tensor:
        lo, hi = torch.minimum(q_lo, k_end), torch.minimum(q_hi, k_end)
        ramp = (hi * (hi + 1) - lo * (lo + 1)) // 2
        return ramp + (q_hi - hi - (q_lo - lo)) * k_end

    return seen(k_hi) - seen(k_lo)


def from_map(
    chosen: Tensor,
    block: int | tuple[int, int],
    lengths: tuple[int, int],
    partial: Tensor | None = None,
) -> BlockLayout:
    """Layout of a bool block map (1|B, 1|Hkv|Hq, nQ, nK); `partial` is a map of the same shape."""
    size = as_block(block)
    grid = grid_of(lengths, size)
    if chosen.dtype != torch.bool or chosen.dim() != 4 or chosen.shape[-2:] != grid:
        raise ValueError(
            f"chosen must be a bool block map (batch, heads, {grid[0]}, {grid[1]}), "
            f"got {chosen.dtype} {tuple(chosen.shape)}"
        )
    if partial is not None and partial.shape != chosen.shape:
        raise ValueError(
            f"partial must be {tuple(chosen.shape)} like chosen, got {tuple(partial.shape)}"
        )
    counts = chosen.sum(-1, dtype=torch.int32)
    width = max(int(counts.max()) if counts.numel() else 0, 1)
    order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :width]
    inside = None if partial is None else partial.gather(-1, order)
    return BlockLayout(order.int(), counts, size, lengths, inside)


def from_mask(mask: Mask, q_len: int, k_len: int, block: int | tuple[int, int]) -> BlockLayout:
    """Layout of the blocks in which `mask` shows at least one pair.

    What the mask's bounds leave open is settled by looking inside, a bounded number of pairs at
    a time: no Lq×Lk tensor is ever built.
    """
    bq, bk = as_block(block)
    grid = TileGrid.of(q_len, k_len, bq)
    nk = -(-k_len // bk)
    q_pos, k_pos = positions(q_len, k_len, None, None, torch.device("cpu"))
    q_tiles = tile_positions(q_pos, grid.lead, bq, grid.tiles)[:, None, :, None]
    k_tiles = tile_positions(k_pos, 0, bk, nk)[:, None, None]
    edges = (q_tiles.amin(-1), q_tiles.amax(-1), k_tiles.amin(-1), k_tiles.amax(-1))
    b, h = mask.axes(torch.device("cpu"))
    full = (mask.batch, mask.heads, grid.tiles, nk)
    some, every = (x.expand(full).clone() for x in mask.bounds(b, h, *edges))
    undecided = some & ~every
    if mask.exact is not None:
        undecided &= ~mask.exact(b, h, *edges)
    start, end = int(q_pos[0, 0]), k_len

    def look(tiles: Tensor, inner: Tensor) -> None:
        """Classify tiles by their rows `inner`."""
        for part in tiles.split(max(1, _PAIRS // (inner.numel() * bk))):
            at_b, at_h, i, j = (x.view(-1, 1, 1) for x in part.unbind(-1))
            rows = (i + grid.first) * bq + inner.view(1, -1, 1)
            cols = j * bk + torch.arange(bk).view(1, 1, -1)
            real = (rows >= start) & (rows < start + q_len) & (cols < end)
            seen = mask(at_b, at_h, rows.clamp(start, start + q_len - 1), cols.clamp_max(end - 1))
            some[tuple(part.T)] = (seen & real).flatten(1).any(-1)
            every[tuple(part.T)] = (seen | ~real).flatten(1).all(-1)

    # An outer row settles most tiles: it shows a visible and a hidden pair.
    undecided = undecided.nonzero()
    for inner in (torch.tensor([bq - 1]), torch.tensor([0]), torch.arange(bq)):
        look(undecided, inner)
        undecided = undecided[(~some | every)[tuple(undecided.T)]]
    return from_map(some, (bq, bk), (q_len, k_len), ~every)


def causal_map(lengths: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Bool map (nQ, nK) of the blocks that hold a pair visible under causality."""
    return visible_pairs(lengths, block, True) > 0


def full_layout(
    q_len: int, k_len: int, block: int | tuple[int, int], *, is_causal: bool = True
) -> BlockLayout:
    """Every (causally visible) block."""
    size = as_block(block)
    if is_causal:
        return from_mask(causal(), q_len, k_len, size)
    shape = grid_of((q_len, k_len), size)
    return from_map(torch.ones(1, 1, *shape, dtype=torch.bool), size, (q_len, k_len))
