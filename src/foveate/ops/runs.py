"""The keys a mask shows, as runs: from here to there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Runs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(b, h, q_pos) -> (…, n, 2): a query sees the positions [first, end) of its n runs."""

# Positions below and above all others.
FAR = (-(1 << 40), 1 << 40)


def joined_runs(left: Runs | None, right: Runs | None, both: bool) -> Runs | None:
    """Runs of the positions in both masks, or in either."""
    if left is None or right is None:
        return None
    one, two = left, right

    def runs(b: Tensor, h: Tensor, q_pos: Tensor) -> Tensor:
        x, y = one(b, h, q_pos), two(b, h, q_pos)
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        x, y = (z.expand(*lead, *z.shape[-2:]) for z in (x, y))
        return _common(x, y) if both else torch.cat((x, y), -2)

    return runs


def _common(x: Tensor, y: Tensor) -> Tensor:
    """What every pair of runs of x and y has in common: (…, n, 2), (…, m, 2) -> (…, n * m, 2)."""
    x, y = x[..., :, None, :], y[..., None, :, :]
    first, end = torch.maximum(x[..., 0], y[..., 0]), torch.minimum(x[..., 1], y[..., 1])
    return torch.stack((first, end), -1).flatten(-3, -2)


def outside(runs: Runs, b: Tensor, h: Tensor, q_pos: Tensor) -> Tensor:
    """Runs of the positions in none of a mask's runs."""
    gaps = None
    for run in runs(b, h, q_pos).unbind(-2):
        # An empty run leaves out nothing, wherever it lies.
        first, end = run[..., 0], torch.maximum(run[..., 0], run[..., 1])
        before = torch.stack((torch.full_like(first, FAR[0]), first), -1)
        after = torch.stack((end, torch.full_like(end, FAR[1])), -1)
        both = torch.stack((before, after), -2)
        gaps = both if gaps is None else _common(gaps, both)
    if gaps is None:
        raise ValueError("a mask with runs needs at least one run")
    return gaps


def one_run(first: Tensor | int, end: Tensor | int, q_pos: Tensor) -> Tensor:
    """One run [first, end) for every query: (…, 1, 2)."""
    ends = torch.broadcast_tensors(*(torch.as_tensor(x, device=q_pos.device) for x in (first, end)))
    run = torch.stack(ends, -1)[..., None, :]
    return run.expand(*torch.broadcast_shapes(run.shape[:-2], q_pos.shape), 1, 2)


def runs_of(table: Tensor) -> Runs | None:
    """Runs of keys that a table (B, L) bool shows to every query; None where a row has holes.

    Off the table its nearest end goes on.
    """
    if not table.shape[1]:
        return None
    slots = torch.arange(table.shape[1], device=table.device)
    first, count = table.long().argmax(1), table.sum(1)
    end = first + count
    if not torch.equal((slots >= first[:, None]) & (slots < end[:, None]), table):
        return None
    first = first.masked_fill(table[:, 0], FAR[0])
    end = end.masked_fill(table[:, -1], FAR[1])

    def runs(b: Tensor, h: Tensor, q_pos: Tensor) -> Tensor:
        row = b % table.shape[0]
        return one_run(first.to(q_pos.device)[row], end.to(q_pos.device)[row], q_pos)

    return runs
