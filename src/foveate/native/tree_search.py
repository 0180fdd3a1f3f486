"""Binary search for the key blocks that a few queries agree with most, by the CPU kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from foveate.native.loader import Kernels, Record, TensorArg

REPRESENTATIVES = ("center", "first", "last")


class _Call(Record):
    """Mirrors TreeCall in tree.cpp."""

    _fields_ = (
        ("q", TensorArg),
        ("k", TensorArg),
        *((name, ctypes.c_void_p) for name in ("lane", "end", "pos", "found", "real")),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("searches", "rows", "dim", "k_len", "slots", "start", "width"),
                *("shift", "dtype", "threads"),
            )
        ),
    )


def tree_search(
    found: Kernels,
    q: Tensor,
    k: Tensor,
    lane: Tensor,
    end: Tensor,
    *,
    slots: int,
    start: int,
    width: int,
    pos: Tensor | None,
    representative: str,
) -> tuple[Tensor, Tensor]:
    """Block indices (N, slots) int64 and which are real; arguments as those of `ops.tree_search`.

    q (N, R, D) and k (H, Lk, D) float32 or bfloat16; D is a multiple of 8.
    """
    (n, rows, dim), k_len = q.shape, k.shape[1]
    blocks = torch.empty(n, slots, dtype=torch.int64)
    real = torch.empty(n, slots, dtype=torch.bool)
    held = [None if x is None else x.long().contiguous() for x in (lane, end, pos)]
    call = _Call(TensorArg.of(q[:, None]), TensorArg.of(k[None]))
    call.lane, call.end, call.pos = (None if x is None else x.data_ptr() for x in held)
    call.found, call.real = blocks.data_ptr(), real.data_ptr()
    call.searches, call.rows, call.dim, call.k_len = n, rows, dim, k_len
    call.slots, call.start, call.width = slots, start, width
    call.shift = REPRESENTATIVES.index(representative)
    call.dtype, call.threads = int(q.dtype == torch.bfloat16), torch.get_num_threads()
    found.call("tree_search", call)
    return blocks, real
