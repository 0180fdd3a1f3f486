"""The orthonormal Walsh–Hadamard transform, which spreads outliers over all channels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# A matrix of this size is multiplied faster than its butterflies are run.
_DIRECT = 64


def hadamard(x: Tensor) -> Tensor:
    """Transform the last axis, x (…, n) -> (…, n); doing it twice gives x back.

    Where n is no power of two, every run of channels as long as the largest power of two that
    divides n is transformed on its own (n = 96: three blocks of 32). Raises TypeError for what is
    no floating tensor.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    n = x.shape[-1]
    width = n & -n
    inner = min(width, _DIRECT)
    outer = width // inner  # H of the whole width is the Kronecker product of H of the two
    y = x.reshape(-1, outer, inner) @ _matrix(inner, x.dtype, x.device)
    if outer > 1:
        y = _matrix(outer, x.dtype, x.device) @ y
    return y.reshape(x.shape)


@lru_cache(maxsize=16)
def _matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The symmetric orthonormal Hadamard matrix of a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return (h * n**-0.5).to(device, dtype)
