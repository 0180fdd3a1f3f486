"""Affine quantisation by groups of tokens or channels; codes take their true number of bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.shapes import check_block

BITS = (2, 3, 4, 8)
# The widths a code is cut into; each is packed on its own: 3 bits are 2 and then 1.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
_ZERO_LIMIT = 32767

Tile = tuple[int, int]
"""Tokens and channels of a group."""


class Quantized(NamedTuple):
    """Packed codes (…, T, n·bits/8) uint8, scale (…, T/t, n/c) bfloat16, zero like scale, int16.

    Groups are tiles of t tokens and c channels. A value is scale·(code − zero). `zero` is no code:
    where a group has one sign, it lies far outside of the codes' range.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize(x: Tensor, bits: int, *, group: int | Tile, clip: float = 1.0) -> Quantized:
    """Quantise x (…, T, n) to 2, 3, 4 or 8 bits, by groups with a scale and a zero of their own.

    group: `c` consecutive channels of one token, or a tile (t, c) of tokens and channels; (t, 1) is
    one channel of t tokens. The range of a group runs from its minimum to its maximum, both times
    `clip` in (0, 1]; a group of one sign is not clipped, for that would move its range off its
    values. Inside the range a value comes back within scale/2, but for float32 rounding. Raises
    ValueError for a group that does not divide T and n, for n that does not fill whole bytes, and
    for bits and clip out of range.
    """
    tile = group if isinstance(group, tuple) else (1, group)
    _check(x, bits, tile, clip)
    tiles = _tiles(x.float(), tile)
    low, high = tiles.amin((-3, -1)), tiles.amax((-3, -1))
    factor = torch.where((low < 0) & (high > 0), clip, 1.0)
    low, high = low * factor, high * factor
    top = 2**bits - 1
    # The second term keeps `zero` within 16 bits where a group is narrow and far from 0.
    reach = torch.maximum(low.abs(), high.abs())
    scale = _round_up(torch.maximum((high - low) / top, reach / _ZERO_LIMIT))
    step = scale.float()
    zero = torch.round(-low / step)
    codes = torch.round(tiles / _spread(step)) + _spread(zero)
    packed = _pack(_rows(codes.clamp(0, top).to(torch.uint8), tile), bits)
    return Quantized(packed, scale, zero.to(torch.int16))


def dequantize(x: Quantized, bits: int, *, group: int | Tile) -> Tensor:
    """Values (…, T, n) float32 of what `quantize` gave with the same bits and group."""
    tile = group if isinstance(group, tuple) else (1, group)
    codes = _tiles(_unpack(x.codes, bits), tile).float()
    return _rows((codes - _spread(x.zero.float())) * _spread(x.scale.float()), tile)


def tile_of(x: Quantized, bits: int) -> Tile:
    """The group of codes (…, T, n·bits/8), T > 0, that have bits each."""
    (length, width), (rows, columns) = x.codes.shape[-2:], x.scale.shape[-2:]
    return length // rows, width * 8 // bits // columns


def quantized_bytes(n: int, bits: int, *, group: int) -> int:
    """Bytes of n quantised channels: codes, and 2 + 2 bytes for each group of channels."""
    return n * bits // 8 + n // group * 4


def _tiles(x: Tensor, tile: Tile) -> Tensor:
    """x (…, T, n) as (…, T/t, t, n/c, c)."""
    tokens, channels = tile
    x = x.unflatten(-1, (-1, channels))
    return x.unsqueeze(-3) if tokens == 1 else x.unflatten(-3, (-1, tokens))


def _rows(tiles: Tensor, tile: Tile) -> Tensor:
    """The inverse of `_tiles`."""
    x = tiles.flatten(-2)
    return x.squeeze(-2) if tile[0] == 1 else x.flatten(-3, -2)


def _spread(x: Tensor) -> Tensor:
    """One number a group (…, T/t, n/c) beside its tile."""
    return x[..., None, :, None]


def _check(x: Tensor, bits: int, tile: Tile, clip: float) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
    if not 0 < clip <= 1:
        raise ValueError(f"clip must be above 0 and at most 1, got {clip}")
    (tokens, channels), n = tile, x.shape[-1]
    if n % check_block("group", channels):
        raise ValueError(f"group must divide the {n} channels, got {channels}")
    if check_block("group", tokens) > 1 and (x.dim() < 2 or x.shape[-2] % tokens):
        raise ValueError(
            f"group must divide the tokens, got groups of {tokens} for x {tuple(x.shape)}"
        )
    whole = 8 // min(_PLANES[bits])
    if n % whole:
        raise ValueError(f"{bits} bits need a multiple of {whole} channels, got {n}")


def _round_up(scale: Tensor) -> Tensor:
    """The next bfloat16 at or above; above 0, so that a group of zeros divides by something."""
    near = scale.clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
    above = torch.nextafter(near, torch.full_like(near, float("inf")))
    return torch.where(near.float() < scale, above, near)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes (…, n·bits/8) of codes (…, n): a byte holds codes that lie n/codes-per-byte apart."""
    planes, below = [], 0
    for width in _PLANES[bits]:
        parts = ((codes >> below) & (2**width - 1)).chunk(8 // width, -1)
        plane = torch.zeros_like(parts[0])
        for i, part in enumerate(parts):
            plane |= part << i * width
        planes.append(plane)
        below += width
    return torch.cat(planes, -1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes (…, n) uint8 of their bytes."""
    n = packed.shape[-1] * 8 // bits
    codes = packed.new_zeros(*packed.shape[:-1], n)
    start = below = 0
    for width in _PLANES[bits]:
        plane = packed[..., start : start + n * width // 8]
        parts = [(plane >> i) & (2**width - 1) for i in range(0, 8, width)]
        codes |= torch.cat(parts, -1) << below
        start, below = start + plane.shape[-1], below + width
    return codes
