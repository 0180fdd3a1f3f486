"""Layers on maps (B, C, H, W): images, and spectrograms of time and frequency."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import conv2d

from foveate import ops


class Planar(nn.Module):
    """A layer x (B, dim, H, W) -> (B, dim, H, W); a subclass writes `forward`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = ops.check_block("dim", dim)

    def check(self, x: Tensor) -> None:
        """Refuse what is no map of `dim` channels."""
        if x.dim() != 4 or x.shape[1] != self.dim or 0 in x.shape:
            raise ValueError(f"x must be (batch, {self.dim}, rows, columns), got {tuple(x.shape)}")


def convolved(x: Tensor, kernels: Tensor) -> Tensor:
    """Each channel of each map (B, C, H, W) under a kernel of its own (B, C, k, k), k odd."""
    each = kernels.flatten(0, 1)[:, None]
    y = conv2d(x.flatten(0, 1)[None], each, padding=kernels.shape[3] // 2, groups=len(each))
    return y[0].unflatten(0, x.shape[:2])


def tokens_of(x: Tensor) -> Tensor:
    """Tokens (B, H·W, C) of a map (B, C, H, W), row by row."""
    return x.flatten(2).mT


def map_of(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The map (B, C, H, W) of tokens (B, H·W, C)."""
    return tokens.mT.unflatten(2, (rows, columns))
