"""Leaving out listed key blocks whose logits stay far below what a row has seen before."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.block_sparse import Tiles
from foveate.ops.layout import BlockLayout
from foveate.ops.shapes import TileGrid
from foveate.ops.tile import cap


class Skip(NamedTuple):
    """The rule: skip a block where it stays `threshold` (natural log) below the running maximum.

    Key blocks come in ascending order. `rows` queries in a row decide together, by the largest
    difference between a row's maximum in the block and its maximum so far; what is skipped counts
    neither in the output nor in lse nor in the running maximum.
    """

    threshold: float
    rows: int = 16


def check_skip(skip: Skip | tuple[float, int] | None, layout: BlockLayout) -> Skip | None:
    """A valid rule; raises ValueError for a threshold that is negative or rows that do not fit."""
    if skip is None:
        return None
    rule = Skip(*skip)
    if not rule.threshold >= 0:
        raise ValueError(f"skip threshold must be at least 0, got {rule.threshold}")
    if rule.rows < 1 or layout.block[0] % rule.rows:
        raise ValueError(
            f"skip rows must divide the {layout.block[0]} rows of a query block, got {rule.rows}"
        )
    return rule


def kept(maxima: Tensor, rule: Skip) -> Tensor:
    """Which blocks stay: maxima (…, rows, m) of every row and listed block -> (…, groups, m)."""
    groups = maxima.unflatten(-2, (-1, rule.rows))
    running = torch.full_like(groups[..., 0], -math.inf)
    stay = []
    for local in groups.unbind(-1):
        # A row that sees nothing of the block has no say, one that sees its first keys wants them.
        gap = torch.where(torch.isneginf(local), local, local - running)
        keep = ~(gap.amax(-1, keepdim=True) <= -rule.threshold)
        running = torch.where(keep, torch.maximum(running, local), running)
        stay.append(keep[..., 0])
    return torch.stack(stay, -1)


@torch.no_grad()
def skipped(tiles: Tiles, rule: Skip) -> BlockLayout:
    """The layout of what stays, one list for every query head and group of rows."""
    layout, shape = tiles.layout, tiles.shape
    counts, lists = tiles.listed()
    every = torch.arange(lists.shape[0], device=lists.device)
    at = every % tiles.grid.tiles * tiles.bq - tiles.grid.lead
    at = at[:, None, None] + torch.arange(tiles.bq, device=lists.device)
    real = (at >= 0) & (at < shape.q_len)
    maxima = []
    for slot in range(lists.shape[1]):
        block = lists[:, slot : slot + 1]
        keys = tiles.k[tiles.kv * tiles.nk + block[:, 0]].view(-1, 1, tiles.bk, shape.dim)
        logits = cap(tiles.q @ keys.transpose(-1, -2) * tiles.scale, tiles.softcap)
        logits = logits + tiles.added(every, block)
        absent = (slot >= counts)[:, None, None] | ~real
        maxima.append(logits.amax(-1).masked_fill(absent, -math.inf))
    stay = kept(torch.stack(maxima, -1), rule) & (
        torch.arange(lists.shape[1], device=lists.device) < counts[:, None, None, None]
    )
    # (lanes, tiles, heads of a lane, groups, m) -> heads, groups in order of position
    n, per = tiles.grid.tiles, tiles.bq // rule.rows
    full = (shape.batch, tiles.lanes, n, tiles.fold, per, lists.shape[1])
    stay = stay.view(full).transpose(2, 3).reshape(shape.batch, shape.q_heads, n * per, -1)
    lists = lists.view(shape.batch, tiles.lanes, n, 1, 1, -1).expand(full)
    lists = lists.transpose(2, 3).reshape(stay.shape)
    fine = TileGrid.of(*layout.lengths, rule.rows)
    here = slice(fine.first - tiles.grid.first * per, None)
    stay, lists = (x[:, :, here][:, :, : fine.tiles] for x in (stay, lists))
    order = (~stay).to(torch.uint8).argsort(dim=-1, stable=True)
    return BlockLayout(
        lists.gather(-1, order).int(),
        stay.sum(-1, dtype=torch.int32),
        (rule.rows, tiles.bk),
        layout.lengths,
    )
