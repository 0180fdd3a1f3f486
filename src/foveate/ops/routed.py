"""Exact attention of single query rows over lists of key blocks, walked key block by key block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.layout import BlockLayout
from foveate.ops.mask import Mask, with_causal
from foveate.ops.merge import merge
from foveate.ops.shapes import Shape, check_qkv, query_offset
from foveate.ops.tile import attend_tile, default_scale, recomputed

# Rows of one step along the causal edge (their later keys are cut off), pairs of any other step.
_EDGE, _PAIRS = 256, 1 << 22


class _Piece(NamedTuple):
    """Rows of the flattened queries (B * Hq * Lq) that read one key block of one kv lane."""

    lane: int
    block: int
    rows: Tensor
    crossed: bool
    """Whether the causal edge may run through the piece."""


def routed_torch(
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
    """PyTorch form of `block_sparse` for blocks of one query row, when many rows share key blocks.

    For each key block the queries that read it are gathered, not the keys of each query; partial
    results meet by their lse. Memory O(L·D + entries of the layout), under autograd O(entries·D).
    """
    shape = check_qkv(q, k, v)
    rule = with_causal(mask, is_causal)
    factor = default_scale(scale, shape.dim)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(shape.batch * shape.q_heads * shape.q_len, shape.v_dim, dtype=wide)
    lse = q.new_full(out.shape[:1], float("-inf"), dtype=wide)
    rows_q, lanes_k, lanes_v = q.reshape(-1, shape.dim), k.flatten(0, 1), v.flatten(0, 1)
    for lane, block, rows, crossed in _pieces(layout, shape, is_causal):
        end = _last_key(rows, block, layout, shape, is_causal)
        keys = slice(block * layout.block[1], end)
        if keys.start >= end:
            continue
        added = _added(rule, rows, keys, shape) if crossed or mask is not None else None
        tile = rows_q, lanes_k[lane, keys], lanes_v[lane, keys], rows, added
        before = out.index_select(0, rows), lse.index_select(0, rows)
        joined, joined_lse = merge([before, recomputed(_part, *tile, factor, softcap)])
        out.index_copy_(0, rows, joined)
        lse.index_copy_(0, rows, joined_lse)
    full = (shape.batch, shape.q_heads, shape.q_len)
    return out.view(*full, -1).to(q.dtype), lse.view(full)


def _part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    added: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of some rows of q (N, D) over keys (M, D): out (R, Dv) and lse (R,)."""
    q_tile = q.index_select(0, rows)[None, None]
    out, lse = attend_tile(q_tile, k[None, None], v[None, None], added, scale, softcap)
    return out[0, 0], lse[0, 0]


def _pieces(layout: BlockLayout, shape: Shape, is_causal: bool) -> Iterator[_Piece]:
    """The entries of a layout by key block; inside a block rows ascend in position."""
    nk, bk = layout.grid[1], layout.block[1]
    buckets, rows = _sorted_entries(layout, shape)
    counts = torch.bincount(buckets, minlength=shape.batch * shape.kv_heads * nk)
    edges = torch.zeros_like(counts)
    if is_causal:
        pos = rows % shape.q_len + query_offset(shape.q_len, shape.k_len)
        crossing = pos < (buckets % nk + 1) * bk - 1
        edges = torch.bincount(buckets[crossing], minlength=counts.numel())
    low, step = 0, max(1, _PAIRS // bk)
    for bucket, (count, edge) in enumerate(zip(counts.tolist(), edges.tolist(), strict=True)):
        middle, high = low + edge, low + count
        for lo in range(low, middle, _EDGE):
            yield _Piece(*divmod(bucket, nk), rows[lo : min(lo + _EDGE, middle)], True)
        for lo in range(middle, high, step):
            yield _Piece(*divmod(bucket, nk), rows[lo : min(lo + step, high)], False)
        low = high


def _sorted_entries(layout: BlockLayout, shape: Shape) -> tuple[Tensor, Tensor]:
    """Every entry as (lane * nK + block, flattened row), by the first, then by position."""
    b, h, n = shape.batch, shape.q_heads, shape.q_len
    head = torch.arange(h, device=layout.indices.device)
    own = head // (h // layout.indices.shape[1])
    full = (b, n, h, layout.indices.shape[-1])
    lane = torch.arange(b, device=head.device)[:, None] * shape.kv_heads + head // shape.group
    lists = layout.indices[:, own].transpose(1, 2)
    buckets = ((lane * layout.grid[1]).int()[:, None, :, None] + lists).expand(full)
    listed = layout.filled[:, own].transpose(1, 2).expand(full).flatten().nonzero().squeeze(-1)
    buckets, order = buckets.flatten().index_select(0, listed).sort(stable=True)
    at = listed.index_select(0, order) // full[3]
    token = at // h
    return buckets, (token // n * h + at % h) * n + token % n


def _last_key(rows: Tensor, block: int, layout: BlockLayout, shape: Shape, is_causal: bool) -> int:
    """One past the last key of the block that the last of the rows may see."""
    end = min((block + 1) * layout.block[1], shape.k_len)
    if not is_causal:
        return end
    last = int(rows[-1]) % shape.q_len + query_offset(shape.q_len, shape.k_len)
    return min(end, last + 1)


def _added(rule: Mask | None, rows: Tensor, keys: slice, shape: Shape) -> Tensor | None:
    """Additive bias (1, 1, rows, keys) with -inf where a row does not see a key."""
    if rule is None:
        return None
    head = rows // shape.q_len
    pos = rows % shape.q_len + query_offset(shape.q_len, shape.k_len)
    cols = torch.arange(keys.start, keys.stop, device=rows.device)
    b, h, p = (x[:, None] for x in (head // shape.q_heads, head % shape.q_heads, pos))
    seen = rule(b, h, p, cols)
    zero = torch.zeros((), dtype=torch.float32, device=rows.device)
    return torch.where(seen, zero, float("-inf")).expand(rows.numel(), -1)[None, None]
