"""Softmax attention of many queries, dense or over lists of key blocks, by the CPU kernel."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.native.loader import Kernels, Record, TensorArg

MAX_RUNS = 4
"""Runs of keys that a row may have."""


_SMALL = 8  # rows that share a list and are too few for a tile of their own


class Masks(NamedTuple):
    """What masks the entries of lists: `entries`, shaped like their indices, int32, number the
    `blocks` (n, block keys, block rows) uint8, 1 = visible; -1 stands for none."""

    entries: Tensor
    blocks: Tensor


class Lists(NamedTuple):
    """Key blocks of every query block, as `BlockLayout` holds them, and their masks.

    indices (1|B, H', nQ, m) and counts (1|B, H', nQ) int32.
    """

    indices: Tensor
    counts: Tensor
    masks: Masks | None = None


class _Call(Record):
    """Mirrors PrefillCall in prefill.cpp."""

    _fields_ = (
        *((name, TensorArg) for name in ("q", "k", "v", "out")),
        *(
            (name, ctypes.c_void_p)
            for name in ("lse", "indices", "counts", "runs", "tiles", "tile_of")
        ),
        *(
            (f"{name}_{axis}", ctypes.c_int64)
            for name in ("indices", "counts", "tile", "runs")
            for axis in ("batch", "head")
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("batch", "q_heads", "kv_heads", "q_len", "k_len", "dim", "v_dim"),
                *("width", "lists", "block_q", "block_k", "lead", "first_tile", "tiles_q"),
                *("run_count", "dtype", "threads", "skip_rows"),
            )
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "skip")),
    )


def decides(found: Kernels, rows: int, first: int) -> bool:
    """Whether the kernel can let `rows` queries skip blocks together, the first at `first`."""
    return first % rows == 0 and bool(found.library.foveate_skip_fits(rows))


def _strides(x: Tensor) -> tuple[int, int]:
    """Strides of the batch and head axes, 0 where the axis broadcasts."""
    return tuple(0 if x.shape[i] == 1 else x.stride(i) for i in (0, 1))  # type: ignore[return-value]


def prefill(
    found: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Tensor,
    *,
    scale: float,
    softcap: float | None,
    block: tuple[int, int],
    lists: Lists | None = None,
    skip: tuple[float, int] | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    tiles: range | None = None,
) -> tuple[Tensor, Tensor]:
    """Out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) float32; head dims are multiples of 8.

    runs (1|B, 1|Hq, Lq, n, 2) int32: a row sees the keys [first, end) of its n <= 4 runs, and of
    these what its list holds. `skip` is (threshold, rows) of a rule that the kernel `decides`.
    `tiles` restricts the call to some query blocks, `into` is where their rows go.
    """
    (b, hq, lq, dim), (hkv, lk), dv = q.shape, k.shape[1:3], v.shape[3]
    if into is None:
        # Rows of all heads side by side: what follows attention wants them so.
        into = q.new_empty(b, lq, hq, dv).transpose(1, 2), torch.empty(b, hq, lq)
    out, lse = into
    start = max(lk - lq, 0)
    first = start // block[0]
    tiles = range(-(-(start + lq) // block[0]) - first) if tiles is None else tiles
    runs = runs.contiguous()
    call = _Call(*(TensorArg.of(x) for x in (q, k, v, out)), lse=lse.data_ptr())
    call.runs, (call.runs_batch, call.runs_head) = runs.data_ptr(), _strides(runs)
    call.batch, call.q_heads, call.kv_heads, call.q_len, call.k_len = b, hq, hkv, lq, lk
    call.dim, call.v_dim, call.lists, call.run_count = dim, dv, 1, runs.shape[3]
    (call.block_q, call.block_k), call.lead = block, start % block[0]
    call.first_tile, call.tiles_q = tiles.start, len(tiles)
    call.dtype, call.threads = int(q.dtype == torch.bfloat16), torch.get_num_threads()
    call.scale, call.softcap = scale, softcap or 0.0
    call.skip, call.skip_rows = skip or (0.0, 0)
    held: list[Tensor] = []
    if lists is not None:
        indices, counts = lists.indices.contiguous(), lists.counts.contiguous()
        held += [indices, counts]
        call.indices, call.counts = indices.data_ptr(), counts.data_ptr()
        call.indices_batch, call.indices_head = _strides(indices)
        call.counts_batch, call.counts_head = _strides(counts)
        call.lists, call.width = indices.shape[1], indices.shape[3]
        if lists.masks is not None:
            held += [x.contiguous() for x in lists.masks]
            call.tile_of, call.tiles = held[2].data_ptr(), held[3].data_ptr()
            call.tile_batch, call.tile_head = _strides(held[2])
    plain = lists is not None and lists.masks is None and skip is None
    lone = plain and block[0] * hq // call.lists <= _SMALL
    found.call("routed" if lone else "prefill", call)
    return out, lse
