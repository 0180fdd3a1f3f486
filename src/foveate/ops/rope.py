"""Rotary position embedding and its exact inverse."""

from __future__ import annotations

import torch
from torch import Tensor


def _turn(x: Tensor, interleaved: bool) -> Tensor:
    """The quarter turn of every rotary pair: (a, b) -> (-b, a)."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((-b, a), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _split(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotary part, rest, and tables with a head axis."""
    width = cos.shape[-1]
    if sin.shape != cos.shape or width > x.shape[-1] or width % 2:
        raise ValueError(
            f"cos and sin must agree and be an even width up to {x.shape[-1]}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.shape[-2] != x.shape[-2]:
        raise ValueError(f"tables hold {cos.shape[-2]} positions, x has {x.shape[-2]}")
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    return x[..., :width], x[..., width:], cos, sin


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate x (B, H, L, D) by tables (B|1, L, R) or (L, R), R <= D: the first R dims turn.

    Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved.
    """
    turning, rest, cos, sin = _split(x, cos, sin)
    turned = turning * cos + _turn(turning, interleaved) * sin
    return torch.cat((turned.to(x.dtype), rest), -1) if rest.shape[-1] else turned.to(x.dtype)


def unrope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Undo `rope` exactly, also for tables scaled by an attention factor."""
    turning, rest, cos, sin = _split(x, cos, sin)
    norm = cos * cos + sin * sin
    back = (turning * cos - _turn(turning, interleaved) * sin) / norm
    return torch.cat((back.to(x.dtype), rest), -1) if rest.shape[-1] else back.to(x.dtype)
