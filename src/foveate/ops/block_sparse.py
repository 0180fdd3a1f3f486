"""Exact softmax attention over chosen key blocks, gathered in bounded chunks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from foveate.ops.layout import BlockLayout
from foveate.ops.mask import Mask, causal, with_causal
from foveate.ops.merge import merge
from foveate.ops.shapes import (
    Shape,
    TileGrid,
    check_qkv,
    positions,
    tile_positions,
)
from foveate.ops.tile import attend_tile, default_scale, needs_grad, recomputed

# Elements of gathered keys per chunk, and keys per tile: small enough that a chunk stays in the
# cache between the gather and the kernel that reads it.
_CHUNK, _KEYS = 1 << 18, 2048
# Pairs of queries and keys up to which a call makes all its logits at once.
_FEW = 1 << 20

Chunk = tuple[Tensor, Tensor, Tensor]


def check_layout(layout: BlockLayout, shape: Shape) -> None:
    """Refuse a layout made for other sizes."""
    if layout.lengths != (shape.q_len, shape.k_len):
        raise ValueError(
            f"layout is for lengths {layout.lengths}, q and k have {(shape.q_len, shape.k_len)}"
        )
    b, h = layout.indices.shape[:2]
    if b not in (1, shape.batch) or h not in (1, shape.kv_heads, shape.q_heads):
        raise ValueError(
            f"layout has (batch, heads) {(b, h)}; wanted batch 1 or {shape.batch} and heads 1, "
            f"{shape.kv_heads} or {shape.q_heads}"
        )


def few_pairs(shape: Shape) -> bool:
    """Whether a call is so small that all its logits at once are faster than block by block."""
    return shape.batch * shape.q_heads * shape.q_len * shape.k_len <= _FEW


def block_sparse_at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    mask: Mask | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """PyTorch form of `block_sparse` for few pairs: dense logits, -inf where nothing is read."""
    shape = check_qkv(q, k, v)
    (bq, bk), device = layout.block, q.device
    lead = TileGrid.of(shape.q_len, shape.k_len, bq).lead
    rows = (torch.arange(shape.q_len, device=device) + lead) // bq
    read = layout.to_bool()[:, :, rows][..., torch.arange(shape.k_len, device=device) // bk]
    read = read.repeat_interleave(shape.q_heads // read.shape[1], 1)
    rule = with_causal(mask, is_causal)
    if rule is not None:
        q_pos, k_pos = positions(shape.q_len, shape.k_len, None, None, device)
        read = read & rule(*rule.axes(device), q_pos[:, None, :, None], k_pos[:, None, None])
    zero = torch.zeros((), dtype=torch.float32, device=device)
    added = torch.where(read, zero, float("-inf"))
    return attend_tile(q, k, v, added, default_scale(scale, shape.dim), softcap)


class Tiles:
    """The query tiles of a call and the key blocks they read.

    One "lane" is what shares a list: a query head, or a whole group when lists are per kv head.
    A tile is (lane, query block); its rows are the block's rows times the heads of the lane.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        *,
        mask: Mask | None,
        is_causal: bool,
        scale: float | None,
        bias: Tensor | None,
        softcap: float | None,
        q_pos: Tensor | None,
        k_pos: Tensor | None,
    ) -> None:
        shape = check_qkv(q, k, v)
        self.shape, self.layout, self.softcap = shape, layout, softcap
        self.edge = causal() if is_causal else None
        self.rule = with_causal(mask, is_causal)
        self.scale = default_scale(scale, shape.dim)
        self.bias = bias
        self.bq, self.bk = layout.block
        self.grid = TileGrid.of(shape.q_len, shape.k_len, self.bq)
        self.nk = layout.grid[1]
        per_head = layout.indices.shape[1] == shape.q_heads
        self.lanes = shape.q_heads if per_head else shape.kv_heads
        self.fold = shape.q_heads // self.lanes
        self.tail = self.grid.tiles * self.bq - self.grid.lead - shape.q_len
        self.grad = needs_grad(q, k, v, bias)
        self.q = self._tile_queries(q)
        lane = torch.arange(self.q.shape[0], device=q.device) // self.grid.tiles
        share = self.lanes // shape.kv_heads
        self.kv = lane // self.lanes * shape.kv_heads + lane % self.lanes // share
        self.room = [q.new_empty(0, 0), q.new_empty(0, 0)]
        self.k, self.v = self._block_keys(k), self._block_keys(v)
        self.q_pos, self.k_pos = positions(shape.q_len, shape.k_len, q_pos, k_pos, q.device)
        self.q_tiles = tile_positions(self.q_pos, self.grid.lead, self.bq, self.grid.tiles)
        self.k_tiles = tile_positions(self.k_pos, 0, self.bk, self.nk)
        self.q_edges, self.k_edges = (
            torch.stack((x.amin(-1), x.amax(-1))) for x in (self.q_tiles, self.k_tiles)
        )

    def _tile_queries(self, q: Tensor) -> Tensor:
        """(B, Hq, Lq, D) -> (tiles, fold, bq, D), ragged ends filled with zeros."""
        s = self.shape
        if self.grid.lead or self.tail:
            q = torch.nn.functional.pad(q, (0, 0, self.grid.lead, self.tail))
        q = q.reshape(s.batch, self.lanes, self.fold, self.grid.tiles, self.bq, s.dim)
        return q.transpose(2, 3).reshape(-1, self.fold, self.bq, s.dim)

    def _block_keys(self, x: Tensor) -> Tensor:
        """(B, Hkv, Lk, D) -> (B * Hkv * nK, bk * D), a view where Lk is a multiple of bk."""
        tail = self.nk * self.bk - x.shape[2]
        if tail:
            x = torch.nn.functional.pad(x, (0, 0, 0, tail))
        return x.reshape(-1, self.bk * x.shape[3])

    def run(self) -> tuple[Tensor, Tensor]:
        """Out (B, Hq, Lq, Dv) and lse (B, Hq, Lq): chunks of lists of equal length are gathered."""
        tiles, wide = self.q.shape[0], torch.promote_types(self.q.dtype, torch.float32)
        out = self.q.new_zeros(tiles, self.fold, self.bq, self.shape.v_dim)
        lse = self.q.new_full((tiles, self.fold, self.bq), float("-inf"), dtype=wide)
        if self.grad:
            passes = [_joined(list(chunks), out, lse) for chunks in self._passes()]
            out, lse = merge(passes) if passes else (out, lse)
        else:
            for at, part, part_lse in chain.from_iterable(self._passes()):
                out[at], lse[at] = merge([(out[at], lse[at]), (part, part_lse)])
        return self._untile(out), self._untile(lse[..., None])[..., 0]

    def _passes(self) -> Iterator[Iterator[Chunk]]:
        """First the blocks that need no mask, a bounded number of keys at a time, then the rest."""
        counts, lists, cut = self._entries()
        whole = (~cut).sum(1)
        # Under autograd every pass keeps an output, so there are just two.
        step = max(1, lists.shape[1] if self.grad else _KEYS // self.bk)
        for lo in range(0, int(whole.max()) if whole.numel() else 0, step):
            yield self._chunks(lists[:, lo:], (whole - lo).clamp(0, step), masked=False)
        # What needs a mask follows what does not.
        slots = torch.arange(lists.shape[1], device=lists.device) + whole[:, None]
        rest = lists.gather(1, slots.clamp_max(lists.shape[1] - 1))
        for lo in range(0, int((counts - whole).max()) if whole.numel() else 0, step):
            yield self._chunks(rest[:, lo:], (counts - whole - lo).clamp(0, step), masked=True)

    def _chunks(self, lists: Tensor, counts: Tensor, masked: bool) -> Iterator[Chunk]:
        """Attention of tiles over their first `counts` blocks, tiles of equal counts together."""
        order = counts.argsort(descending=True, stable=True)
        sizes, runs = torch.unique_consecutive(counts[order], return_counts=True)
        start = 0
        for width, run in zip(sizes.tolist(), runs.tolist(), strict=True):
            per_tile = width * self.bk * max(self.shape.dim, self.shape.v_dim)
            for rows in order[start : start + run].split(max(1, _CHUNK // max(per_tile, 1))):
                if width:
                    # Under autograd a chunk is gathered again backward: only these are kept.
                    chunk = rows, lists[rows, :width], masked, self.q, self.k, self.v, self.bias
                    yield rows, *recomputed(self._chunk, *chunk)
            start += run

    def listed(self) -> tuple[Tensor, Tensor]:
        """Per tile: the length of its list, and the list (tiles, m)."""
        full = (self.shape.batch, self.lanes, self.grid.tiles)
        counts = self.layout.counts.expand(full).flatten().long()
        return counts, self.layout.indices.expand(*full, -1).reshape(counts.numel(), -1).long()

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per tile: its count, its list (tiles, m) and which entries need a mask, those last.

        Filler, which counts as needing one, comes last of all.
        """
        counts, lists = self.listed()
        filler = torch.arange(lists.shape[1], device=counts.device) >= counts[:, None]
        cut = (lists == self.nk - 1) & bool(self.shape.k_len % self.bk)
        cut = cut | self._crossed(lists) | filler
        if self.bias is not None:
            cut = torch.ones_like(cut)
        masked_last = (cut.to(torch.uint8) + filler).argsort(dim=1, stable=True)
        return counts, lists.gather(1, masked_last), cut.gather(1, masked_last)

    def _untile(self, x: Tensor) -> Tensor:
        s, n = self.shape, self.grid.tiles
        x = x.view(s.batch, self.lanes, n, self.fold, self.bq, x.shape[-1]).transpose(2, 3)
        x = x.reshape(s.batch, s.q_heads, n * self.bq, x.shape[-1])
        return x[:, :, self.grid.lead : self.grid.lead + s.q_len]

    def _chunk(
        self, tiles: Tensor, lists: Tensor, masked: bool, *_: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of tiles (c,) over their lists (c, m) of blocks."""
        c, m = lists.shape
        flat = (self.kv[tiles, None] * self.nk + lists).flatten()
        k = self._gathered(self.k, flat, 0).view(c, 1, m * self.bk, self.shape.dim)
        v = self._gathered(self.v, flat, 1).view(c, 1, m * self.bk, self.shape.v_dim)
        added = self.added(tiles, lists) if masked else None
        return attend_tile(self.q[tiles], k, v, added, self.scale, self.softcap)

    def _gathered(self, x: Tensor, rows: Tensor, which: int) -> Tensor:
        """Rows of x, in memory that the chunks share where nothing must be kept for autograd."""
        if self.grad:
            return x.index_select(0, rows)
        if self.room[which].shape[0] < rows.numel():
            self.room[which] = x.new_empty(rows.numel(), x.shape[1])
        return torch.index_select(x, 0, rows, out=self.room[which][: rows.numel()])

    def _heads(self, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch row, heads that a mask can tell apart, first head and query block of tiles."""
        lane, i = tiles // self.grid.tiles, tiles % self.grid.tiles
        b, head = lane // self.lanes, lane % self.lanes * self.fold
        told = self.fold if self.rule is not None and self.rule.heads > 1 else 1
        return b, head[:, None] + torch.arange(told, device=tiles.device), head, i

    def added(self, tiles: Tensor, lists: Tensor) -> Tensor:
        """Additive bias (c, fold|1, bq, m * bk): -inf where a pair is not visible."""
        c, m = lists.shape
        b, heads, head, i = self._heads(tiles)
        at = torch.arange(c, device=tiles.device).repeat_interleave(m)
        seen = self._pairs(b[at], heads[at], i[at], lists.flatten())
        seen = seen.view(c, m, -1, self.bq, self.bk).permute(0, 2, 3, 1, 4).flatten(3)
        added = torch.where(seen, 0.0, float("-inf"))
        return added if self.bias is None else added + self._bias_tiles(b, head, i, lists)

    def _crossed(self, lists: Tensor) -> Tensor:
        """Entries (tiles, m) in which the mask's edge may run."""
        if self.rule is None:
            return torch.zeros_like(lists, dtype=torch.bool)
        b, heads, _, i = self._heads(torch.arange(lists.shape[0], device=lists.device))
        partial = self.layout.partial
        if partial is None:
            return self._cut(self.rule, b, heads, i, lists)
        shape = (self.shape.batch, self.lanes, self.grid.tiles, lists.shape[1])
        known = partial.expand(shape).reshape(lists.shape)
        # A layout made from a mask alone does not know that causality was asked for as well.
        return known if self.edge is None else known | self._cut(self.edge, b, heads, i, lists)

    def _cut(self, rule: Mask, b: Tensor, heads: Tensor, i: Tensor, lists: Tensor) -> Tensor:
        """Entries (c, m) that the bounds of a mask do not call full."""
        q_lo, q_hi = self.q_edges[:, b % self.q_tiles.shape[0], i].view(2, -1, 1, 1, 1)
        row = (b % self.k_tiles.shape[0])[:, None]
        k_lo, k_hi = self.k_edges[:, row, lists][:, :, None, None]
        at = (b.view(-1, 1, 1, 1), heads[:, :, None, None], q_lo, q_hi, k_lo, k_hi)
        _, every = rule.bounds(*at)
        return ~every.expand(lists.shape[0], heads.shape[1], 1, lists.shape[1]).all(1)[:, 0]

    def _pairs(self, b: Tensor, heads: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Visible pairs of single blocks: (n, heads, bq, bk)."""
        cols = j[:, None] * self.bk + torch.arange(self.bk, device=j.device)
        real = (cols < self.shape.k_len)[:, None, None, :]
        if self.rule is None:
            return real.expand(-1, heads.shape[1], self.bq, -1)
        q_pos = self.q_tiles[b % self.q_tiles.shape[0], i][:, None, :, None]
        k_pos = self.k_tiles[b % self.k_tiles.shape[0], j][:, None, None, :]
        seen = self.rule(b.view(-1, 1, 1, 1), heads[:, :, None, None], q_pos, k_pos)
        return (seen & real).expand(-1, heads.shape[1], self.bq, self.bk)

    def _bias_tiles(self, b: Tensor, head: Tensor, i: Tensor, lists: Tensor) -> Tensor:
        """The caller's bias at the pairs of a chunk: (c, fold|1, bq|1, m * bk)."""
        bias = self.bias
        if bias is None:
            raise ValueError("no bias to tile")
        lq, lk = self.shape.q_len, self.shape.k_len
        dev = lists.device
        rows = i[:, None] * self.bq + torch.arange(self.bq, device=dev) - self.grid.lead
        cols = (lists[..., None] * self.bk + torch.arange(self.bk, device=dev)).flatten(1)
        heads = head[:, None] + torch.arange(self.fold, device=dev)
        at = (
            (b % bias.shape[0]).view(-1, 1, 1, 1),
            (heads % bias.shape[1])[:, :, None, None],
            rows.clamp(0, lq - 1)[:, None, :, None] if bias.shape[2] > 1 else 0,
            cols.clamp_max(lk - 1)[:, None, None, :] if bias.shape[3] > 1 else 0,
        )
        return bias[at]


def _joined(chunks: list[Chunk], out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks in the order of the tiles; tiles that none of them holds have seen no key."""
    rows = torch.cat([at for at, _, _ in chunks])
    back = torch.full((out.shape[0],), len(rows), device=rows.device)
    back[rows] = torch.arange(len(rows), device=rows.device)
    outs = torch.cat([*(part for _, part, _ in chunks), torch.zeros_like(out[:1])])
    lses = torch.cat([*(part for _, _, part in chunks), torch.full_like(lse[:1], float("-inf"))])
    return outs[back], lses[back]
