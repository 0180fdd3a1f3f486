"""`attend` and `block_sparse` on the CPU kernels, where these can serve the call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from foveate.native.decode import decode
from foveate.native.prefill import MAX_RUNS, Lists, Masks, decides, prefill
from foveate.ops.backend import native_for
from foveate.ops.layout import BlockLayout
from foveate.ops.mask import Mask, with_causal
from foveate.ops.shapes import Shape, TileGrid, check_qkv, positions, query_offset, tile_positions
from foveate.ops.skip import Skip
from foveate.ops.tile import default_scale

# Rows and keys of a block where no layout says them; rows a layout may ask for; queries that are
# so few that the keys are cut among the threads instead; bytes of masks that are made at a time.
_BLOCK, _ROWS, _FEW, _BYTES = (64, 64), 1024, 8, 1 << 25


def attend_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    q_pos: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Dense attention by the kernel, or None where it cannot serve the call."""
    shape = check_qkv(q, k, v)
    found = native_for(q, k, v)
    if found is None or not _fits(shape):
        return None
    options: dict[str, Any] = {"scale": default_scale(scale, shape.dim), "softcap": softcap}
    if shape.q_len == 1 and mask is None and q_pos is None:
        return decode(found, q, k, v, None, **options)  # the last query sees every key
    runs = _runs(with_causal(mask, is_causal), shape, q_pos)
    if runs is None:
        return None
    if shape.q_len <= _FEW and runs.shape[3] == 1:
        return decode(found, q, k, v, runs[..., 0, :], **options)
    return prefill(found, q, k, v, runs, block=_BLOCK, **options)


def block_sparse_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    mask: Mask | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    q_pos: Tensor | None,
    skip: Skip | None,
) -> tuple[Tensor, Tensor] | None:
    """Block-sparse attention by the kernel, or None where it cannot serve the call."""
    shape = check_qkv(q, k, v)
    found = native_for(q, k, v)
    if found is None or not _fits(shape) or layout.block[0] > _ROWS or not layout.indices.numel():
        return None
    if skip is not None and not decides(found, skip.rows, query_offset(*layout.lengths)):
        return None
    factor = default_scale(scale, shape.dim)
    runs = _runs(with_causal(mask, is_causal), shape, q_pos)
    options: dict[str, Any] = {
        "scale": factor,
        "softcap": softcap,
        "block": layout.block,
        "skip": skip,
    }
    if runs is not None:
        lists = Lists(layout.indices.int(), layout.counts.int())
        return prefill(found, q, k, v, runs, lists=lists, **options)
    if mask is None or q_pos is not None:
        return None
    # The mask is no union of a few runs: what it shows of a block is written out, for some query
    # blocks at a time; causality is left to the runs.
    runs = _ends(shape, is_causal)
    out = q.new_empty(shape.batch, shape.q_len, shape.q_heads, shape.v_dim).transpose(1, 2)
    into = out, torch.empty(shape.batch, shape.q_heads, shape.q_len)
    for tiles, lists in _written(mask, layout, shape):
        prefill(found, q, k, v, runs, lists=lists, tiles=tiles, into=into, **options)
    return into


def _fits(shape: Shape) -> bool:
    return (
        shape.dim % 8 == 0 == shape.v_dim % 8
        and shape.q_len > 0
        and max(shape.dim, shape.v_dim) <= 1024
    )


def _runs(rule: Mask | None, shape: Shape, q_pos: Tensor | None) -> Tensor | None:
    """Runs (1|B, 1|H, Lq, n, 2) int32 of the keys a mask shows; None if it has no such form."""
    pos, _ = positions(shape.q_len, shape.k_len, q_pos, None, torch.device("cpu"))
    if rule is None:
        return _ends(shape, False)
    if rule.runs is None:
        return None
    b, h = rule.axes(torch.device("cpu"))
    runs = rule.runs(b[..., 0], h[..., 0], pos[:, None])
    return runs.clamp(0, shape.k_len).int() if runs.shape[-2] <= MAX_RUNS else None


def _ends(shape: Shape, is_causal: bool) -> Tensor:
    """The run (1, 1, Lq, 1, 2) int32 from the first key to the last, or to the query's own."""
    runs = torch.zeros(1, 1, shape.q_len, 1, 2, dtype=torch.int32)
    own = torch.arange(shape.k_len - shape.q_len, shape.k_len)[:, None] + 1
    runs[..., 1] = own if is_causal else shape.k_len
    return runs


def _written(mask: Mask, layout: BlockLayout, shape: Shape) -> Iterator[tuple[range, Lists]]:
    """Some query blocks at a time: their numbers, and all lists with the masks of these blocks."""
    b, h = (
        max(n, m) for n, m in zip(layout.indices.shape[:2], (mask.batch, mask.heads), strict=True)
    )
    nq, width = layout.indices.shape[2:]
    bq, bk = layout.block
    indices = _spread(layout.indices.int(), b, h)
    counts = _spread(layout.counts.int()[..., None], b, h)[..., 0]
    cut = _cut(mask, indices, layout, shape) & (torch.arange(width) < counts[..., None])
    grid, start = TileGrid.of(*layout.lengths, bq), query_offset(*layout.lengths)
    step = max(1, _BYTES // (b * h * width * bq * bk))
    for lo in range(0, nq, step):
        tiles = range(lo, min(lo + step, nq))
        part = cut[:, :, lo : tiles.stop]
        at = part.nonzero()
        row, col = indices[:, :, lo : tiles.stop][part].long(), torch.arange(bk)
        at_b, at_h, i = (x[:, None, None] for x in at.T[:3])
        q_pos = ((i + lo + grid.first) * bq + torch.arange(bq)).clamp(
            start, start + shape.q_len - 1
        )
        k_pos = row[:, None, None] * bk + col[:, None]
        seen = mask(at_b, at_h, q_pos, k_pos.clamp_max(shape.k_len - 1)).expand(-1, bk, bq)
        tile_of = torch.full(indices.shape, -1, dtype=torch.int32)
        tile_of[:, :, lo : tiles.stop][part] = torch.arange(len(at), dtype=torch.int32)
        yield tiles, Lists(indices, counts, Masks(tile_of, seen.to(torch.uint8)))


def _spread(x: Tensor, batch: int, heads: int) -> Tensor:
    """Lists (1|B, H', …) for every batch row and head that a mask tells apart."""
    return x.repeat_interleave(heads // x.shape[1], 1).expand(batch, heads, *x.shape[2:])


def _cut(mask: Mask, indices: Tensor, layout: BlockLayout, shape: Shape) -> Tensor:
    """Entries like indices in which the edge of a mask may run."""
    if layout.partial is not None:
        return _spread(layout.partial, *indices.shape[:2])
    bq, bk = layout.block
    grid = TileGrid.of(shape.q_len, shape.k_len, bq)
    pos, _ = positions(shape.q_len, shape.k_len, None, None, torch.device("cpu"))
    rows = tile_positions(pos, grid.lead, bq, grid.tiles)[:, None, :, None]
    k_lo = indices.long() * bk
    k_hi = (k_lo + bk - 1).clamp_max(shape.k_len - 1)
    b, h = mask.axes(torch.device("cpu"))
    return ~mask.bounds(b, h, rows.amin(-1), rows.amax(-1), k_lo, k_hi)[1].expand(indices.shape)
