"""Affine quantisation by groups of channels, with codes packed to their true number of bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.shapes import check_block

BITS = (2, 3, 4, 8)
# The widths a code is cut into; each is packed on its own: 3 bits are 2 and then 1.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
_ZERO_LIMIT = 32767


class Quantized(NamedTuple):
    """Packed codes (…, n·bits/8) uint8, scale (…, n/group) bfloat16, zero (…, n/group) int16.

    A value is scale·(code − zero). `zero` is no code: where a group has one sign, it lies far
    outside of the codes' range.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize(x: Tensor, bits: int, *, group: int, clip: float = 1.0) -> Quantized:
    """Quantise x (…, n) to 2, 3, 4 or 8 bits, by groups of `group` consecutive channels.

    The range of a group runs from its minimum to its maximum, both times `clip` in (0, 1]; a group
    of one sign is not clipped, for that would move its range off its values. Inside the range a
    value comes back within scale/2, but for float32 rounding. Raises ValueError for a group that
    does not divide n, for n that does not fill whole bytes, and for bits and clip out of range.
    """
    _check(x, bits, group, clip)
    tiles = x.float().unflatten(-1, (-1, group))
    low, high = tiles.amin(-1), tiles.amax(-1)
    factor = torch.where((low < 0) & (high > 0), clip, 1.0)
    low, high = low * factor, high * factor
    top = 2**bits - 1
    # The second term keeps `zero` within 16 bits where a group is narrow and far from 0.
    reach = torch.maximum(low.abs(), high.abs())
    scale = _round_up(torch.maximum((high - low) / top, reach / _ZERO_LIMIT))
    step = scale.float()
    zero = torch.round(-low / step)
    codes = torch.round(tiles / step[..., None]) + zero[..., None]
    packed = _pack(codes.clamp(0, top).to(torch.uint8).flatten(-2), bits)
    return Quantized(packed, scale, zero.to(torch.int16))


def dequantize(x: Quantized, bits: int, *, group: int) -> Tensor:
    """Values (…, n) float32 of what `quantize` gave with the same bits and group."""
    codes = _unpack(x.codes, bits).unflatten(-1, (-1, group)).float()
    return ((codes - x.zero.float()[..., None]) * x.scale.float()[..., None]).flatten(-2)


def quantized_bytes(n: int, bits: int, *, group: int) -> int:
    """Bytes of n quantised channels: codes, and 2 + 2 bytes of scale and zero for each group."""
    return n * bits // 8 + n // group * 4


def _check(x: Tensor, bits: int, group: int, clip: float) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
    if not 0 < clip <= 1:
        raise ValueError(f"clip must be above 0 and at most 1, got {clip}")
    n = x.shape[-1]
    if n % check_block("group", group):
        raise ValueError(f"group must divide the {n} channels, got {group}")
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
