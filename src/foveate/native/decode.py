"""Softmax attention of few queries over long or listed keys, by the CPU kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from foveate.native.loader import Kernels, Record, TensorArg


class QueryArg(Record):
    """Queries, results and options of one call; mirrors Queries in decode.hpp."""

    _fields_ = (
        ("q", TensorArg),
        ("out", TensorArg),
        ("lse", ctypes.c_void_p),
        ("runs", ctypes.c_void_p),
        ("runs_batch", ctypes.c_int64),
        ("runs_head", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("batch", "q_heads", "kv_heads", "q_len", "k_len", "dim", "v_dim"),
                *("dtype", "threads"),
            )
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class _Call(Record):
    """Mirrors DecodeCall in decode.cpp."""

    _fields_ = (
        ("queries", QueryArg),
        ("k", TensorArg),
        ("v", TensorArg),
        ("lists", ctypes.c_void_p),
        ("valid", ctypes.c_void_p),
        *((f"lists_{axis}", ctypes.c_int64) for axis in ("batch", "head", "row")),
        *((name, ctypes.c_int32) for name in ("list_heads", "list_rows", "entries", "width")),
    )


def broadcast_strides(x: Tensor, axes: int) -> list[int]:
    """Strides of the first axes, 0 where one broadcasts."""
    return [0 if x.shape[i] == 1 else x.stride(i) for i in range(axes)]


def query_arg(
    q: Tensor, out: Tensor, lse: Tensor, kv: tuple[int, int], runs: Tensor | None, **options: float
) -> QueryArg:
    """The argument for queries q and their results over kv = (heads, length) keys.

    runs (1|B, 1|Hq, Lq, 2) int32 is contiguous in its last two axes. options: scale, softcap. All
    tensors must outlive the call.
    """
    arg = QueryArg(TensorArg.of(q), TensorArg.of(out), lse.data_ptr(), **options)
    if runs is not None:
        arg.runs = runs.data_ptr()
        arg.runs_batch, arg.runs_head = broadcast_strides(runs, 2)
    arg.batch, arg.q_heads, arg.q_len, arg.dim = q.shape
    (arg.kv_heads, arg.k_len), arg.v_dim = kv, out.shape[3]
    arg.dtype, arg.threads = int(q.dtype == torch.bfloat16), torch.get_num_threads()
    return arg


def results(q: Tensor, v_dim: int) -> tuple[Tensor, Tensor]:
    """Unwritten out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) for queries q."""
    b, heads, length, _ = q.shape
    # Rows of all heads side by side: what follows attention wants them so.
    out = q.new_empty(b, length, heads, v_dim).transpose(1, 2)
    return out, torch.empty(b, heads, length)


def decode(
    found: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) float32 of queries that read a run of keys each.

    runs (1|B, 1|Hq, Lq, 2) int32: a row sees the keys [first, end) within 0 … Lk; None: all keys.
    The keys are cut among the threads, so that one head can use them all; made for few queries.
    """
    out, lse = results(q, v.shape[3])
    runs = None if runs is None else runs.contiguous()
    options = {"scale": scale, "softcap": softcap or 0.0}
    queries = query_arg(q, out, lse, (k.shape[1], k.shape[2]), runs, **options)
    found.call("decode", _Call(queries, TensorArg.of(k), TensorArg.of(v)))
    return out, lse


def gather(
    found: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    valid: Tensor | None,
    *,
    width: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Out and lse of queries that read listed tokens or blocks; arguments as `ops.gather`'s."""
    out, lse = results(q, v.shape[3])
    lists = idx.to(torch.int32).contiguous()
    valid = None if valid is None else valid.contiguous()
    options = {"scale": scale, "softcap": softcap or 0.0}
    queries = query_arg(q, out, lse, (k.shape[1], k.shape[2]), None, **options)
    call = _Call(queries, TensorArg.of(k), TensorArg.of(v), lists.data_ptr())
    call.valid = None if valid is None else valid.data_ptr()
    call.lists_batch, call.lists_head, call.lists_row = broadcast_strides(lists, 3)
    _, call.list_heads, call.list_rows, call.entries = lists.shape
    call.width = width
    found.call("decode", call)
    return out, lse
