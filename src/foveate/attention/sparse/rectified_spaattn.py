"""Rectified SpaAttn: attention re-allocation for sparse video generation (2025, paper 152)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Attention, Call, Result, dense_result
from foveate.ops import BlockLayout
from foveate.ops.tile import cap, default_scale, grouped_values
from foveate.registry import Card, register

# Above the distance of tokens that touch at a corner of a grid of three axes.
_TOUCHING = 1.8


@register(
    Card(
        name="rectified_spaattn",
        title="Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
        year=2025,
        paper=152,
        claim="giving the blocks that are left out their pooled share of the attention keeps a "
        "video's quality at a tenth to a quarter of the blocks",
        kind="attention",
        family="sparse",
        patterns=("noncausal self",),
        pretrained="approximate",
        phases=("prefill",),
        cost="O(L·D + (L/block)²·D) to choose, density·L²·D to attend; O(L·D) memory",
        decoding="none: a video is attended to as a whole",
        confidence="high: official code, with means over real tokens in a ragged last block",
        small={"shape": (7, 4, 4), "block": 16, "drop": 0.8},
        full={"drop": 0.0},
    )
)
@dataclass(frozen=True, kw_only=True)
class RectifiedSpaAttn(Attention):
    """Critical blocks are read, others stand for their mean where that errs less than dropping.

    Of the pooled shares of attention a query block takes the largest up to `p_keep`, at least
    1 - `drop` of all blocks; blocks that touch it on the grid; with `first_frame` those of the
    first frame if it is one; and all text, which comes after the grid and sees everything. What
    is read weighs what the mean values leave. `shape` is (frames, height, width), (height, width)
    or (length,), row-major; with `tile` the grid is cut into blocks box by box. Under a mask no
    means are used. drop <= 0 is dense. (The authors keep two layers and five steps dense.)
    """

    block: int = 128
    shape: tuple[int, ...] = (16, 32, 32)
    tile: tuple[int, ...] = ()
    drop: float = 0.75
    p_keep: float = 0.3
    first_frame: bool = False

    def __post_init__(self) -> None:
        ops.check_block("block", self.block)
        if not self.drop < 1:
            raise ValueError(f"drop must be below 1, got {self.drop}")
        if not self.p_keep > 0:
            raise ValueError(f"p_keep must be above 0, got {self.p_keep}")
        if self.first_frame and len(self.shape) != 3:
            raise ValueError(f"first_frame needs a shape (frames, height, width), got {self.shape}")
        ops.disc(self.shape, _TOUCHING, tile=self.tile or None)  # refuses what does not fit

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Rectified attention with the tokens in tile order, put back into theirs."""
        size = prod(self.shape)
        if k.shape[2] < size:
            raise ValueError(f"a grid of shape {self.shape} has {size} keys, got {k.shape[2]}")
        if q.shape[2] > k.shape[2]:
            raise ValueError(
                f"expected at most {k.shape[2]} queries, one per key, got {q.shape[2]}"
            )
        if self.drop <= 0 or q.shape[2] <= k.shape[2] - size:
            return dense_result(q, k, v, call)
        if not self.tile:
            return self._rectified(q, k, v, call)
        if call.mask is not None or q.shape[2] != k.shape[2]:
            # Masks and chunks of queries know positions in row-major order only.
            return dataclasses.replace(self, tile=()).compute(q, k, v, call)
        order = torch.arange(k.shape[2])
        order[:size] = ops.tile_order(self.shape, self.tile)
        order = order.to(q.device)
        q, k, v = (x[:, :, order] for x in (q, k, v))
        found, back = self._rectified(q, k, v, call), order.argsort()
        lse = None if found.lse is None else found.lse[:, :, back]
        return Result(found.out[:, :, back], lse, found.layout)

    def _rectified(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Video queries: critical blocks and text in one softmax, and means; text queries: all."""
        size, options = prod(self.shape), call.options()
        text = k.shape[2] - size
        rows = q.shape[2] - text
        asked, keys, values = q[:, :, :rows], k[:, :, :size], v[:, :, :size]
        critical, pooled = self.shares(asked, k, call)
        layout = ops.from_map(critical, self.block, (rows, size))
        out, lse = ops.block_sparse(asked, keys, values, layout, return_lse=True, **options)
        if text:
            at, words = torch.arange(k.shape[2], device=q.device), k[:, :, size:]
            where = {"q_pos": at[size - rows : size], "k_pos": at[size:]} if call.mask else {}
            beside = ops.attend(asked, words, v[:, :, size:], return_lse=True, **options | where)
            out, lse = ops.merge([(out, lse), beside])
        if call.mask is None:
            means = grouped_values(pooled, ops.pool_blocks(values, self.block))
            left = 1 - pooled.sum(-1, keepdim=True)
            means, left = (self._by_row(x, rows) for x in (means, left))
            out = (left * out + means).to(q.dtype)
        if text:
            below = ops.attend(q[:, :, rows:], k, v, return_lse=True, **options)
            out, lse = (torch.cat(x, 2) for x in zip((out, lse), below, strict=True))
        if call.record is not None:
            layout = _with_text(critical, self.block, (q.shape[2], k.shape[2]), size)
        return Result(out, lse, layout)

    def shares(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """What blocks of video queries read and what share of their attention means stand for.

        q (B, Hq, rows, D) are the queries of the video, k (B, Hkv, Lk, D) all keys. Returns the
        critical blocks (B, Hq, nQ, nK) bool and the shares of those left to their means, else 0.
        """
        size, b = prod(self.shape), self.block
        video, lead = k[:, :, :size], ops.TileGrid.of(q.shape[2], size, b).lead
        q_mean, k_mean = ops.pool_blocks(q, b, lead=lead), ops.pool_blocks(video, b)
        n = k_mean.shape[2]
        # A mean stands for the tokens of its block, a word of the text for itself.
        weight = k_mean.new_ones(n + k.shape[2] - size)
        weight[:n] = b
        weight[n - 1] = size - (n - 1) * b
        every = torch.cat((k_mean, k[:, :, size:].to(k_mean.dtype)), 2)
        logits = ops.grouped_logits(q_mean, every, default_scale(call.scale, q.shape[3]))
        probs = torch.softmax(cap(logits, call.softcap) + weight.log(), -1)
        with torch.no_grad():
            entries = torch.cat((probs[..., :n], probs[..., n:].sum(-1, keepdim=True)), -1)
            least = max(1, int((1 - self.drop) * n + 1e-6))  # (1 - 0.9) * 10 < 1
            largest = ops.top_p(entries, self.p_keep) | ops.top_k(entries, least)
            critical = largest[..., :n] | _near(self, q.shape[2]).to(q.device)
            gain = ops.grouped_logits(q_mean, k_mean, 1.0).abs()
            q_error = ops.grouped_logits(self._deviation(q, q_mean), k_mean, 1.0).abs()
            k_error = ops.grouped_logits(q_mean, self._deviation(video, k_mean), 1.0).abs()
        return critical, probs[..., :n].masked_fill(critical | (gain <= q_error + k_error), 0.0)

    def _deviation(self, x: Tensor, mean: Tensor) -> Tensor:
        """Mean distance of a block's tokens from their mean, dim by dim: (B, H, n, D)."""
        lead = ops.TileGrid.of(x.shape[2], prod(self.shape), self.block).lead
        gaps = (x - self._by_row(mean, x.shape[2])).abs()
        return ops.pool_blocks(gaps, self.block, lead=lead)

    def _by_row(self, x: Tensor, rows: int) -> Tensor:
        """What holds for blocks (B, H, n, D), for each of the last `rows` tokens of the video."""
        lead = ops.TileGrid.of(rows, prod(self.shape), self.block).lead
        return x.repeat_interleave(self.block, 2)[:, :, lead : lead + rows]


@lru_cache(maxsize=16)
def _near(grid: RectifiedSpaAttn, rows: int) -> Tensor:
    """Blocks (nQ, nK) that touch each other, and those of the first frame if asked for."""
    touching = ops.disc(grid.shape, _TOUCHING, tile=grid.tile or None)
    near = touching.to_layout(rows, prod(grid.shape), grid.block).to_bool()[0, 0]
    if not grid.first_frame:
        return near
    order = ops.tile_order(grid.shape, grid.tile or grid.shape)
    first = torch.zeros(near.shape[1], dtype=torch.bool)
    first[(order < prod(grid.shape[1:])).nonzero() // grid.block] = True
    start = near.shape[1] - near.shape[0]  # the queries are the last ones
    return near | (first[start:, None] & first)


def _with_text(critical: Tensor, block: int, lengths: tuple[int, int], size: int) -> BlockLayout:
    """The layout of a video's critical blocks and of the text beside it, read whole."""
    grid, nk = ops.TileGrid.of(*lengths, block), -(-lengths[1] // block)
    chosen = critical.new_ones(*critical.shape[:2], grid.tiles, nk)
    end = nk if lengths[1] == size else size // block  # a block that text shares is read whole
    inside = (..., slice(0, max(end - grid.first, 0)), slice(0, end))
    chosen[inside] = critical[inside]
    return ops.from_map(chosen, block, lengths)
