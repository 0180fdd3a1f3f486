"""What claims about grids share: random tokens and the time of one attention against another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.bench.timing import paired


def tokens(length: int, heads: int = 4, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v (1, heads, length, dim), the same every time."""
    made = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, heads, length, dim, generator=made)
    return q, k, v


@torch.inference_mode()
def times_faster(slow: Callable[[], object], fast: Callable[[], object], rounds: int = 5) -> float:
    """How many times faster the second is, median of interleaved rounds."""
    return paired(slow, fast, rounds)[2]
