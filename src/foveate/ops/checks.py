"""Checks of single tensors, shared by the recurrences."""

from __future__ import annotations

import torch
from torch import Tensor


def check_floating(**tensors: Tensor | None) -> None:
    """Refuse, by name, what is neither None nor a floating tensor on the device of the first."""
    device: torch.device | None = None
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if device is not None and x.device != device:
            first = next(iter(tensors))
            raise ValueError(f"{name} is on {x.device}, {first} is on {device}: they must match")
        device = x.device


def check_shape(name: str, x: Tensor, want: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tuple(x.shape) != want:
        raise ValueError(f"{name} must be {tuple(want)}, got {tuple(x.shape)}")


def check_axis(name: str, x: Tensor, dim: int) -> tuple[int, ...]:
    """The shape of a tensor without its axis `dim`, which must exist."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be an axis of {name} {tuple(x.shape)}, got {dim}")
    return tuple(n for i, n in enumerate(x.shape) if i != dim % x.dim())
