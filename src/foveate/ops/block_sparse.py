"""Exact softmax attention over chosen key blocks, gathered in bounded chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.layout import BlockLayout
from foveate.ops.mask import Mask, causal
from foveate.ops.shapes import (
    Shape,
    TileGrid,
    check_qkv,
    positions,
    tile_positions,
)
from foveate.ops.tile import attend_tile, default_scale, recomputed

# Elements of gathered keys per chunk: small enough that a chunk stays in the cache between the
# gather and the kernel that reads it.
_CHUNK = 1 << 18


def block_sparse_torch(
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
) -> tuple[Tensor, Tensor]:
    """PyTorch form of `block_sparse`: gathers chunks of lists of equal length."""
    shape = check_qkv(q, k, v)
    rule = mask if not is_causal else (causal() if mask is None else mask & causal())
    edge = causal() if is_causal else None
    return _Tiles(q, k, v, layout, shape, rule, edge, bias, scale, softcap, q_pos, k_pos).run()


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


class _Tiles:
    """Query tiles in the order of their list lengths, and the key blocks they read.

    One "lane" is what shares a list: a query head, or a whole group when lists are per kv head.
    A tile is (lane, query block); its rows are the block's rows times the heads of the lane.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        shape: Shape,
        rule: Mask | None,
        edge: Mask | None,
        bias: Tensor | None,
        scale: float | None,
        softcap: float | None,
        q_pos: Tensor | None,
        k_pos: Tensor | None,
    ) -> None:
        self.shape, self.layout, self.softcap = shape, layout, softcap
        self.rule, self.edge = rule, edge
        self.scale = default_scale(scale, shape.dim)
        self.bias = bias
        self.bq, self.bk = layout.block
        self.grid = TileGrid.of(shape.q_len, shape.k_len, self.bq)
        self.nk = layout.grid[1]
        per_head = layout.indices.shape[1] == shape.q_heads
        self.lanes = shape.q_heads if per_head else shape.kv_heads
        self.fold = shape.q_heads // self.lanes
        self.tail = self.grid.tiles * self.bq - self.grid.lead - shape.q_len
        self.q = self._tile_queries(q)
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
        """Out (B, Hq, Lq, Dv) and lse (B, Hq, Lq)."""
        s, n = self.shape, self.grid.tiles
        full = (s.batch, self.lanes, n)
        counts = self.layout.counts.expand(full).flatten().long()
        lists = self.layout.indices.expand(*full, -1).reshape(counts.numel(), -1).long()
        partial = self.layout.partial
        if partial is not None:
            partial = partial.expand(*full, -1).reshape(counts.numel(), -1)
        order = counts.argsort(descending=True, stable=True)
        outs, lses, start = [], [], 0
        sizes = counts[order].tolist()
        while start < len(sizes):
            width = sizes[start]
            step = max(1, _CHUNK // max(1, width * self.bk * max(s.dim, s.v_dim)))
            rows = order[start : start + step]
            inside = None if partial is None else partial[rows, :width]
            chunk = rows, lists[rows, :width], counts[rows], inside
            # Under autograd a chunk is gathered again backward: only these tensors are kept.
            out, lse = recomputed(self._chunk, *chunk, self.q, self.k, self.v, self.bias)
            outs.append(out)
            lses.append(lse)
            start += step
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(sizes)).to(order))
        return self._untile(torch.cat(outs)[back]), self._untile(torch.cat(lses)[back][..., None])[
            ..., 0
        ]

    def _untile(self, x: Tensor) -> Tensor:
        s, n = self.shape, self.grid.tiles
        x = x.view(s.batch, self.lanes, n, self.fold, self.bq, x.shape[-1]).transpose(2, 3)
        x = x.reshape(s.batch, s.q_heads, n * self.bq, x.shape[-1])
        return x[:, :, self.grid.lead : self.grid.lead + s.q_len]

    def _chunk(
        self,
        tiles: Tensor,
        lists: Tensor,
        counts: Tensor,
        partial: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of a chunk of tiles (c,) over their lists (c, m)."""
        c, m = lists.shape
        s = self.shape
        lane = tiles // self.grid.tiles
        kv = lane // self.lanes * s.kv_heads + lane % self.lanes // (self.lanes // s.kv_heads)
        flat = (kv[:, None] * self.nk + lists).flatten()
        k = self.k.index_select(0, flat).view(c, 1, m * self.bk, s.dim)
        v = self.v.index_select(0, flat).view(c, 1, m * self.bk, s.v_dim)
        added = self._added(tiles, lists, counts, partial)
        q = self.q.index_select(0, tiles)
        return attend_tile(q, k, v, added, self.scale, self.softcap)

    def _added(
        self, tiles: Tensor, lists: Tensor, counts: Tensor, partial: Tensor | None
    ) -> Tensor | None:
        """Additive bias (c, fold|1, bq, m * bk): -inf where a pair is not visible."""
        c, m = lists.shape
        lane, i = tiles // self.grid.tiles, tiles % self.grid.tiles
        b, head = lane // self.lanes, lane % self.lanes * self.fold
        heads = head[:, None] + torch.arange(self._rule_heads(), device=tiles.device)
        filler = torch.arange(m, device=tiles.device) >= counts[:, None]
        ragged = (lists == self.nk - 1) & bool(self.shape.k_len % self.bk)
        masked = filler | ragged | self._crossed(b, heads, i, lists, partial)
        if self.bias is None and not masked.any():
            return None
        added = self.k.new_zeros(c, m, heads.shape[1], self.bq, self.bk, dtype=torch.float32)
        at, slot = masked.nonzero().unbind(-1)
        if at.numel():
            seen = self._pairs(b[at], heads[at], i[at], lists[at, slot]) & ~filler[at, slot].view(
                -1, 1, 1, 1
            )
            added[at, slot] = torch.zeros_like(seen, dtype=torch.float32).masked_fill_(
                ~seen, float("-inf")
            )
        added = added.permute(0, 2, 3, 1, 4).reshape(c, heads.shape[1], self.bq, m * self.bk)
        return added if self.bias is None else added + self._bias_tiles(b, head, i, lists)

    def _rule_heads(self) -> int:
        """Heads of a lane that a mask can tell apart."""
        return self.fold if self.rule is not None and self.rule.heads > 1 else 1

    def _crossed(
        self, b: Tensor, heads: Tensor, i: Tensor, lists: Tensor, partial: Tensor | None
    ) -> Tensor:
        """Entries (c, m) in which the mask's edge may run."""
        if self.rule is None:
            return torch.zeros_like(lists, dtype=torch.bool)
        if partial is None:
            return self._cut(self.rule, b, heads, i, lists)
        # A layout made from a mask alone does not know that causality was asked for as well.
        return partial if self.edge is None else partial | self._cut(self.edge, b, heads, i, lists)

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
