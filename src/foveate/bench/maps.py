"""A layout as a small picture: which share of each cell's visible pairs was computed."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops import BlockLayout, visible_pairs

CELLS = 64


def block_map(layout: BlockLayout, head: int) -> list[list[float | None]]:
    """At most 64 × 64 shares (rows: queries, columns: keys); None where nothing is visible."""
    chosen = layout.to_bool()[0]
    chosen = chosen[head * chosen.shape[0] // max(chosen.shape[0], head + 1)]
    pairs = visible_pairs(layout.lengths, layout.block, True)
    total = _shrink(pairs)
    share = _shrink(pairs * chosen) / total.clamp_min(1)
    return [
        [round(float(x), 3) if n else None for x, n in zip(row, visible, strict=True)]
        for row, visible in zip(share.tolist(), total.tolist(), strict=True)
    ]


def _shrink(pairs: Tensor) -> Tensor:
    """Sum blocks into at most 64 × 64 cells."""
    out = pairs.double()
    for axis in (0, 1):
        n = out.shape[axis]
        cell = torch.arange(n) * min(n, CELLS) // n
        shape = list(out.shape)
        shape[axis] = min(n, CELLS)
        out = torch.zeros(shape, dtype=out.dtype).index_add_(axis, cell, out)
    return out
