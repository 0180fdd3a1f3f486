"""Every stride-th key block, shifted from head to head: what several mechanisms read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from foveate import ops
from foveate.ops import BlockLayout


def head_offsets(q_heads: int, kv_heads: int, stride: int, step: int | None) -> tuple[int, ...]:
    """Shift of every kv head, `step` apart; None: stride / query heads, at least 1."""
    apart = max(1, stride // q_heads) if step is None else step
    return tuple(h * apart for h in range(kv_heads))


@lru_cache(maxsize=64)
def causal_strides(
    lengths: tuple[int, int],
    block: int,
    stride: int,
    local: int,
    offsets: Sequence[int],
    dense_heads: int = 0,
) -> BlockLayout:
    """Block J is read by block I >= J if I - J < local or (J + offset) % stride == 0.

    One list per kv head, the last `dense_heads` of which read everything. Strides are absolute: a
    block that fell out of a head's sight never returns.
    """
    rows, cols = block_numbers(lengths, block)
    shift = torch.tensor(offsets).view(-1, 1, 1)
    chosen = (rows - cols < local) | ((cols + shift) % stride == 0)
    chosen[len(offsets) - dense_heads :] = True
    return ops.from_map((chosen & (cols <= rows))[None], block, lengths)


def block_numbers(lengths: tuple[int, int], block: int) -> tuple[Tensor, Tensor]:
    """Absolute numbers of query blocks (nQ, 1) and of key blocks (nK,)."""
    grid = ops.TileGrid.of(*lengths, block)
    rows = torch.arange(grid.first, grid.first + grid.tiles)[:, None]
    return rows, torch.arange(-(-lengths[1] // block))
