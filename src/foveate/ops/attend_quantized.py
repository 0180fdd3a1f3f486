"""Dense attention over quantised keys and values, which are never dequantised as a whole."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from foveate.native.quantized import PackedArg, serves
from foveate.native.quantized import attend_quantized as attend_packed
from foveate.ops.api import attend
from foveate.ops.backend import current, native_for
from foveate.ops.merge import merge
from foveate.ops.quantize import BITS, Quantized, dequantize, tile_of
from foveate.ops.shapes import Shape, check_causal
from foveate.ops.tile import default_scale

Pair = tuple[Tensor, Tensor]
"""Keys and values."""

# Numbers that are dequantised at a time, and the most queries that the kernel serves: with more,
# dequantising once for all of them is faster.
_CHUNK, _QUERIES = 1 << 20, 16


@overload
def attend_quantized(
    q: Tensor,
    k: Quantized,
    v: Quantized,
    *,
    k_bits: int,
    v_bits: int,
    exact: Pair | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def attend_quantized(
    q: Tensor,
    k: Quantized,
    v: Quantized,
    *,
    k_bits: int,
    v_bits: int,
    exact: Pair | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
def attend_quantized(
    q: Tensor,
    k: Quantized,
    v: Quantized,
    *,
    k_bits: int,
    v_bits: int,
    exact: Pair | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention of q (B, Hq, Lq, D) over what `quantize` made of keys and values.

    k of x (B, Hkv, Lk, D) with k_bits, v of x (B, Hkv, Lk, Dv) with v_bits; their groups, read off
    the shapes, may differ -> out (B, Hq, Lq, Dv) in the dtype of q, and with `return_lse` the
    natural log-sum-exp (B, Hq, Lq). exact: keys (B, Hkv, n, D) and values (B, Hkv, n, Dv) in the
    dtype of q, tokens that follow. causal: the queries are the last Lq of all tokens. scale
    defaults to 1/sqrt(D); `softcap` bounds logits. Forward and gradients of q; the kernel rounds
    what meets codes, queries and weights, to 16 bits. Raises TypeError or ValueError for what does
    not fit together.
    """
    shape = _check(q, k, v, k_bits, v_bits)
    if exact is not None:
        shape = _check_exact(q, exact, shape)
    check_causal(shape.q_len, shape.k_len, causal)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    options: dict[str, Any] = {"scale": default_scale(scale, shape.dim), "softcap": softcap}
    coded = k.codes.shape[2]
    if coded == 0 and exact is not None:
        out, lse = attend(q, *exact, causal=causal, return_lse=True, **options)
    else:
        exact = exact if coded < shape.k_len else None
        out, lse = _served(q, k, v, exact, (k_bits, v_bits), shape, causal, options)
    return (out, lse) if return_lse else out


def _served(
    q: Tensor,
    k: Quantized,
    v: Quantized,
    exact: Pair | None,
    bits: tuple[int, int],
    shape: Shape,
    causal: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The call on the backend that can serve it."""
    if shape.k_len == 0:
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
        return q.new_zeros(*q.shape[:3], shape.v_dim), lse
    tiles = tile_of(k, bits[0]), tile_of(v, bits[1])
    fits = all(map(serves, bits, tiles, (shape.dim, shape.v_dim)))
    plain = all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (*k, *v, *(exact or ())))
    found = native_for(q) if fits and plain and shape.q_len <= _QUERIES else None
    if found is None:
        return _in_steps(q, k, v, exact, bits, tiles, shape, causal, options)
    packed_k, packed_v = PackedArg.of(k, bits[0], tiles[0]), PackedArg.of(v, bits[1], tiles[1])
    runs = _causal_runs(shape) if causal and shape.q_len > 1 else None
    options |= {"kv": (shape.kv_heads, shape.k_len), "v_dim": shape.v_dim}
    return attend_packed(found, q, packed_k, packed_v, exact, runs, **options)


def _causal_runs(shape: Shape) -> Tensor:
    """Runs (1, 1, Lq, 2) of the keys that the last Lq of Lk positions see."""
    ends = torch.arange(shape.k_len - shape.q_len + 1, shape.k_len + 1, dtype=torch.int32)
    return torch.stack((torch.zeros_like(ends), ends), -1)[None, None]


def _in_steps(
    q: Tensor,
    k: Quantized,
    v: Quantized,
    exact: Pair | None,
    bits: tuple[int, int],
    tiles: tuple[tuple[int, int], tuple[int, int]],
    shape: Shape,
    causal: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attention over some tokens at a time, dequantised and merged; by the reference over all."""
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    coded, past = k.codes.shape[2], shape.k_len - shape.q_len
    q_pos = torch.arange(past, shape.k_len, device=q.device)

    def attended(keys: Tensor, values: Tensor, lo: int) -> tuple[Tensor, Tensor]:
        """Attention to the keys from position lo on."""
        cut = causal and lo + keys.shape[2] > past + 1
        found = keys.to(wide.dtype), values.to(wide.dtype)
        at = q_pos - lo if cut else None
        return attend(wide, *found, causal=cut, q_pos=at, return_lse=True, **options)

    group = math.lcm(tiles[0][0], tiles[1][0])
    fit = _CHUNK // (shape.batch * shape.kv_heads * max(shape.dim, shape.v_dim))
    step = coded if current() == "reference" else max(1, fit // group) * group
    parts: list[tuple[Tensor, Tensor]] = []
    for lo in range(0, coded, step):
        hi = min(lo + step, coded)
        keys, values = (
            dequantize(_tokens(x, lo, hi, tile[0]), n, group=tile)
            for x, n, tile in zip((k, v), bits, tiles, strict=True)
        )
        parts = [merge([*parts, attended(keys, values, lo)])]
    if exact is not None:
        parts = [merge([*parts, attended(*exact, coded)])]
    return parts[0][0].to(q.dtype), parts[0][1]


def _tokens(x: Quantized, lo: int, hi: int, tokens: int) -> Quantized:
    """The tokens [lo, hi), both at edges of groups of `tokens`."""
    rows = slice(lo // tokens, hi // tokens)
    return Quantized(x.codes[..., lo:hi, :], x.scale[..., rows, :], x.zero[..., rows, :])


def _check(q: Tensor, k: Quantized, v: Quantized, k_bits: int, v_bits: int) -> Shape:
    """Sizes of the call; refuses what does not fit together."""
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q must be floating (B, Hq, Lq, D), got {q.dtype} {tuple(q.shape)}")
    dims = []
    for name, x, bits in (("k", k, k_bits), ("v", v, v_bits)):
        if bits not in BITS:
            raise ValueError(f"{name}_bits must be one of {BITS}, got {bits!r}")
        dims.append(_check_parts(name, x, bits, q))
    (b, hq, lq, d), (hkv, lk) = q.shape, k.codes.shape[1:3]
    if v.codes.shape[1:3] != (hkv, lk):
        raise ValueError(
            f"v has (heads, length) {tuple(v.codes.shape[1:3])}, k {(hkv, lk)}: they must match"
        )
    if dims[0] != d:
        raise ValueError(f"head dim of k is {dims[0]} at {k_bits} bits, that of q is {d}")
    if hkv == 0 or hq % hkv:
        raise ValueError(f"{hq} query heads do not divide evenly over {hkv} kv heads")
    return Shape(b, hq, hkv, lq, lk, d, dims[1])


def _check_exact(q: Tensor, exact: Pair, shape: Shape) -> Shape:
    """Sizes with the exact tokens; refuses what does not fit the codes."""
    for name, x, dim in zip("kv", exact, (shape.dim, shape.v_dim), strict=True):
        length = exact[0].shape[-2]
        wanted = (shape.batch, shape.kv_heads, length, dim)
        if x.shape != wanted or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"exact {name} must be {wanted} {q.dtype} on {q.device}, "
                f"got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    return shape._replace(k_len=shape.k_len + exact[0].shape[2])


def _check_parts(name: str, x: Quantized, bits: int, q: Tensor) -> int:
    """Channels of one quantised tensor whose parts fit each other and the queries."""
    if not isinstance(x, Quantized):
        raise TypeError(f"{name} must be what ops.quantize returns, got {type(x).__name__}")
    wanted = {"codes": torch.uint8, "scale": torch.bfloat16, "zero": torch.int16}
    for part, dtype in wanted.items():
        held = getattr(x, part)
        if held.dim() != 4 or held.dtype != dtype or held.device != q.device:
            raise ValueError(
                f"{name}.{part} must be (B, Hkv, ·, ·) {dtype} on {q.device}, "
                f"got {tuple(held.shape)} {held.dtype} on {held.device}"
            )
    (b, heads, length, width), (sb, sh, rows, columns) = x.codes.shape, x.scale.shape
    n = width * 8 // bits
    fits = (sb, sh) == (b, heads) and x.zero.shape == x.scale.shape and b == q.shape[0]
    whole = columns > 0 and n % columns == 0 and (length == rows == 0 or rows > 0 == length % rows)
    if not (fits and whole):
        shapes = ", ".join(f"{part} {tuple(getattr(x, part).shape)}" for part in wanted)
        raise ValueError(
            f"{name} of {bits} bits has {shapes} for q {tuple(q.shape)}: these do not fit together"
        )
    return n
