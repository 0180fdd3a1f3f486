"""Binary search for the key blocks that a few queries agree with most."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.native import tree_search as native
from foveate.ops.backend import native_for
from foveate.ops.checks import check_floating, check_shape
from foveate.ops.shapes import check_block

# Elements of gathered keys, or of scores, in one step.
_CHUNK = 1 << 22


def tree_search(
    q: Tensor,
    k: Tensor,
    lane: Tensor,
    end: Tensor,
    *,
    slots: int,
    start: int = 0,
    width: int = 1,
    pos: Tensor | None = None,
    representative: str = "center",
) -> tuple[Tensor, Tensor]:
    """Indices (N, slots) of key blocks found in O(log) rounds, and which of them are real.

    Search i has queries q[i] of q (N, R, D) and keys [start, end[i]) of head lane[i] of k
    (H, Lk, D), in blocks of `width`; lane, end (N,). The blocks are cut into `slots` even runs;
    each round halves every run, scores a half by the largest q·k of its representative block
    (center, first or last of the half), and keeps the `slots` best, until runs are single blocks.
    Keys after a query's position pos (N, R) do not count for it. Scores are float32. Raises
    TypeError or ValueError for what does not fit together.
    """
    check_block("slots", slots)
    check_block("width", width)
    if representative not in native.REPRESENTATIVES:
        raise ValueError(f"representative must be center, first or last, got {representative!r}")
    _check(q, k, lane, end, start, pos)
    n, rows, dim = q.shape
    kernels = native_for(q, k)
    if kernels is not None and dim % 8 == 0 and q.dtype == k.dtype and n and rows:
        return native.tree_search(
            *(kernels, q, k, lane, end),
            slots=slots,
            start=start,
            width=width,
            pos=pos,
            representative=representative,
        )
    step = max(1, _CHUNK // (max(rows, dim) * 2 * slots * width))
    found = []
    for lo in range(0, n, step):
        part = slice(lo, lo + step)
        seen = None if pos is None else pos[part]
        score = _Score(q[part], k, lane[part], end[part], start, width, seen)
        found.append(_search(score, slots, representative))
    blocks, real = zip(*found, strict=True)
    return torch.cat(blocks), torch.cat(real)


def _check(q: Tensor, k: Tensor, lane: Tensor, end: Tensor, start: int, pos: Tensor | None) -> None:
    """Refuse searches that do not fit the call or reach outside the keys."""
    check_floating(q=q, k=k)
    if q.dim() != 3 or k.dim() != 3 or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q must be (N, R, D), k (H, Lk, D), got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    heads, length = k.shape[:2]
    check_shape("lane", lane, q.shape[:1])
    check_shape("end", end, q.shape[:1])
    if pos is not None:
        check_shape("pos", pos, q.shape[:2])
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")
    if len(lane) and not 0 <= int(lane.min()) <= int(lane.max()) < heads:
        raise ValueError(
            f"lane must lie in [0, {heads}), got {int(lane.min())} to {int(lane.max())}"
        )
    if len(end) and int(end.max()) > length:
        raise ValueError(f"end must be at most {length}, the number of keys, got {int(end.max())}")


def _search(score: _Score, slots: int, representative: str) -> tuple[Tensor, Tensor]:
    """The search proper: first blocks of the runs left, and whether they are not empty."""
    blocks = (score.end - score.start).clamp_min(0).add(score.width - 1) // score.width
    cuts = blocks[:, None] * torch.arange(slots + 1, device=blocks.device) // slots
    first, size = cuts[:, :-1], cuts.diff(dim=-1)
    while bool((size > 1).any()):
        half = size // 2
        first, size = torch.cat((first, first + half), -1), torch.cat((half, size - half), -1)
        shift = {"center": size // 2, "first": torch.zeros_like(size), "last": size - 1}
        scores = score(first + shift[representative]).masked_fill(size == 0, float("-inf"))
        best = scores.topk(slots, dim=-1, sorted=False).indices
        first, size = first.gather(-1, best), size.gather(-1, best)
    return first, size > 0


class _Score:
    """Largest q·k of key blocks, for a chunk of searches."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        lane: Tensor,
        end: Tensor,
        start: int,
        width: int,
        pos: Tensor | None,
    ) -> None:
        self.q = q.to(torch.promote_types(q.dtype, torch.float32))
        self.k, self.lane, self.end = k, lane, end
        self.start, self.width, self.pos = start, width, pos

    def __call__(self, blocks: Tensor) -> Tensor:
        """Scores (n, m) of blocks (n, m)."""
        n, length, dim = blocks.shape[0], *self.k.shape[1:]
        inside = torch.arange(self.width, device=blocks.device)
        tokens = (self.start + blocks[..., None] * self.width + inside).flatten(1)
        flat = (self.lane[:, None] * length + tokens.clamp(0, length - 1)).flatten()
        keys = self.k.reshape(-1, dim).index_select(0, flat).view(n, -1, dim).to(self.q.dtype)
        scores = self.q @ keys.transpose(1, 2)
        if self.pos is not None:
            scores = scores.masked_fill(tokens[:, None] > self.pos[..., None], float("-inf"))
        best = scores.amax(1).masked_fill(tokens >= self.end[:, None], float("-inf"))
        return best.view(n, -1, self.width).amax(-1)
