"""Softmax attention of few queries over quantised keys and values, by the CPU kernel."""

from __future__ import annotations

import ctypes

from torch import Tensor

from foveate.native.decode import QueryArg, query_arg, results
from foveate.native.loader import Kernels, Record, TensorArg

BITS = (2, 4, 8)
"""Widths of codes that the kernel reads."""


class PackedArg(Record):
    """Codes with their scales and zeros; mirrors Packed in quantized.cpp."""

    _fields_ = (
        *((name, TensorArg) for name in ("codes", "scale", "zero")),
        *((name, ctypes.c_int32) for name in ("bits", "tokens", "channels")),
    )

    @classmethod
    def of(
        cls, parts: tuple[Tensor, Tensor, Tensor], bits: int, tile: tuple[int, int]
    ) -> PackedArg:
        """The argument for (codes, scale, zero), each 4-D; the tensors must outlive the call."""
        return cls(*(TensorArg.of(x) for x in parts), bits, *tile)


def _whole_groups(channels: int, row_bytes: int) -> bool:
    """Whether groups are whole planes of a row, or whole vectors within one."""
    within = channels % 32 == 0 and row_bytes % channels == 0
    return within or (channels % 16 == 0 and channels % row_bytes == 0)


class _Call(Record):
    """Mirrors QuantizedCall in quantized.cpp."""

    _fields_ = (
        *(("queries", QueryArg), ("k", PackedArg), ("v", PackedArg)),
        *(("exact_k", TensorArg), ("exact_v", TensorArg), ("exact", ctypes.c_int32)),
    )


def serves(bits: int, tile: tuple[int, int], dim: int) -> bool:
    """Whether the kernel reads codes of a head dim in groups of (tokens, channels)."""
    tokens, channels = tile
    by_token = tokens == 1 and (channels == dim or _whole_groups(channels, dim * bits // 8))
    by_channel = channels == 1 and tokens % 16 == 0
    return bits in BITS and dim % 16 == 0 and dim <= 1024 and (by_token or by_channel)


def attend_quantized(
    found: Kernels,
    q: Tensor,
    k: PackedArg,
    v: PackedArg,
    exact: tuple[Tensor, Tensor] | None,
    runs: Tensor | None,
    *,
    kv: tuple[int, int],
    v_dim: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) float32; kv = (heads, length) of all keys.

    exact: keys and values of the last tokens, in the dtype of q; runs as in `decode.decode`.
    """
    out, lse = results(q, v_dim)
    runs = None if runs is None else runs.contiguous()
    queries = query_arg(q, out, lse, kv, runs, scale=scale, softcap=softcap or 0.0)
    call = _Call(queries, k, v)
    if exact is not None:
        call.exact_k, call.exact_v = map(TensorArg.of, exact)
        call.exact = exact[0].shape[2]
    found.call("quantized", call)
    return out, lse
