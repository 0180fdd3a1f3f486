"""Tokens that are kept for ever, until the next such token, or for a window: who sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate import ops
from foveate.ops import BlockLayout, Mask
from foveate.ops.tile import grouped_logits, grouped_values, recomputed

# Types of a token, and a slot that holds none.
GLOBAL, LOCAL, SLIDING, EMPTY = range(4)
# A position after all others.
_NEVER = 1 << 40
# Rows of one step of the masked attention that is trained.
_ROWS = 128


def next_global(kinds: Tensor, at: Tensor) -> Tensor:
    """Position of the first Global token from each one on, itself included; (…, n) both."""
    places = torch.where(kinds == GLOBAL, at, _NEVER)
    return places.flip(-1).cummin(-1).values.flip(-1)


def last_seen(kinds: Tensor, at: Tensor, window: int) -> Tensor:
    """Position of the last query that sees each token, -1 for empty slots."""
    sliding = torch.where(kinds == SLIDING, at + window, -1)
    local = torch.where(kinds == LOCAL, next_global(kinds, at), sliding)
    return torch.where(kinds == GLOBAL, _NEVER, local)


def kept_for(types: Tensor) -> Tensor:
    """Share of the sequence that each token is kept for, at its own type: like types (…, n, 3).

    Sliding tokens, which are kept for a window, count 0.
    """
    n = types.shape[-2]
    at = torch.arange(n, device=types.device).expand(types.shape[:-1])
    until = next_global(types.argmax(-1), at).clamp_max(n)
    share = torch.stack((n - at, until - at, torch.zeros_like(at)), -1) / n
    return share.to(types.dtype) * types


def live_blocks(last: Tensor, q_len: int, block: int) -> BlockLayout:
    """Blocks with a key that one of their queries may see; last (B, Hkv, m) counts slots."""
    lengths, size = (q_len, last.shape[2]), (min(block, q_len), block)
    grid = ops.TileGrid.of(*lengths, size[0])
    first = (torch.arange(grid.tiles, device=last.device) + grid.first) * size[0]
    first = first.clamp_min(lengths[1] - q_len)
    tail = -lengths[1] % block
    latest = torch.nn.functional.pad(last, (0, tail), value=-_NEVER)
    latest = latest.unflatten(-1, (-1, block)).amax(-1)[:, :, None]
    live = (first[:, None] <= latest) & ops.causal_map(lengths, size).to(last.device)
    return ops.from_map(live, size, lengths)


def soft_attend(
    q: Tensor, k: Tensor, v: Tensor, types: Tensor, window: int, mask: Mask | None = None
) -> Tensor:
    """Causal attention to the tokens that their types (B, Hkv, L, 3) keep, differentiable in them.

    Weights are M·exp(s) over their sum with M = G + L·Π(1 - G of the tokens between) + S within
    the window, rows at a time, so that no L×L tensor is kept.
    """
    outs, reach = [], types.new_zeros(*types.shape[:2], 0)
    rule = ops.causal() if mask is None else mask & ops.causal()
    for lo in range(0, q.shape[2], _ROWS):
        hi = min(lo + _ROWS, q.shape[2])
        at = torch.arange(lo, hi, device=q.device)
        keys = torch.arange(hi, device=q.device)
        seen = rule.to_dense(hi - lo, hi, q_pos=at, k_pos=keys, device=q.device)
        fresh = reach.new_ones(*types.shape[:2], hi - lo)
        out, reach = recomputed(
            _soft_rows, q[:, :, lo:hi], k[:, :, :hi], v[:, :, :hi], types[:, :, :hi],
            torch.cat((reach, fresh), -1), seen, window,
        )  # fmt: skip
        outs.append(out)
    return torch.cat(outs, 2)


def _soft_rows(
    q: Tensor, k: Tensor, v: Tensor, types: Tensor, reach: Tensor, seen: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """The last rows: their outputs, and how far Local tokens reach at the last of them.

    reach (B, Hkv, n) is that of the row before the first, 1 for keys that it did not have.
    """
    n, rows = k.shape[2], q.shape[2]
    t, i = torch.arange(n - rows, n, device=q.device)[:, None], torch.arange(n, device=q.device)
    stays, local, sliding = types.unbind(-1)
    # A row passes a Global token when the row before it was that token, later than the key.
    before = torch.nn.functional.pad(1 - stays, (1, 0))[:, :, n - rows : n, None]
    reaches = reach[:, :, None] * torch.where(t - 1 > i, before, 1.0).cumprod(2)
    shown = stays[:, :, None] + local[:, :, None] * reaches
    shown = shown + sliding[:, :, None] * (t - i <= window)
    group = q.shape[1] // k.shape[1]
    logits = grouped_logits(q, k, q.shape[3] ** -0.5).masked_fill(~seen, float("-inf"))
    top = logits.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weights = shown.repeat_interleave(group, 1) * torch.exp(logits - top)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    return grouped_values(weights, v).to(q.dtype), reaches[:, :, -1]
