"""Linear recurrences by the CPU kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from foveate.native.loader import Kernels, Record, TensorArg

SIDES = (None, "key", "value")
"""What a log-decay acts on, in the order of the kernel's numbers: all of the state, or one side."""


class _Call(Record):
    """Mirrors ScanCall in scan.cpp."""

    _fields_ = (
        *((name, TensorArg) for name in ("q", "k", "v", "out", "decay", "beta")),
        ("valid", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("batch", "q_heads", "kv_heads", "length", "key_dim", "value_dim"),
                *("side", "dtype", "threads"),
            )
        ),
        ("scale", ctypes.c_float),
    )


def scan(
    found: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    decay: Tensor | None,
    side: str | None,
    beta: Tensor | None,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Out (B, Hq, T, V) in q's type and the last state (B, Hkv, K, V) float32.

    q (B, Hq, T, K), k (B, Hkv, T, K), v (B, Hkv, T, V); K and V are multiples of 8. Log-decay
    (B, Hkv, T, 1|K|V) and beta (B, Hkv, T, 1) are float32, valid (B, T) bool.
    """
    (b, hq, length, key_dim), hkv, value_dim = q.shape, k.shape[1], v.shape[3]
    # Rows of all heads side by side: what follows attention wants them so.
    out = q.new_empty(b, length, hq, value_dim).transpose(1, 2)
    last = state.clone(memory_format=torch.contiguous_format)
    call = _Call(*(TensorArg.of(x) for x in (q, k, v, out)))
    if decay is not None:
        call.decay = TensorArg.of(decay)
    if beta is not None:
        call.beta = TensorArg.of(beta)
    if valid is not None:
        valid = valid.contiguous()
        call.valid = valid.data_ptr()
    call.state = last.data_ptr()
    call.batch, call.q_heads, call.kv_heads = b, hq, hkv
    call.length, call.key_dim, call.value_dim = length, key_dim, value_dim
    call.side, call.scale = SIDES.index(side), scale
    call.dtype, call.threads = int(q.dtype == torch.bfloat16), torch.get_num_threads()
    found.call("scan", call)
    return out, last
