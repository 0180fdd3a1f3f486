"""Keys and values that decoding keeps in a batch whose rows have seen different numbers of tokens.

A row's tokens have the positions that they would have without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.nn._attention import rotary
from foveate.ops import Mask


@dataclass(frozen=True)
class Held:
    """Keys and values (B, H, n, D) of tokens at positions `at` (B, n), ascending in each row.

    Those that are padding are not among `real` (B, n).
    """

    keys: Tensor
    values: Tensor
    at: Tensor
    real: Tensor

    def joined(self, other: Held) -> Held:
        """Both, those of the other after these."""
        return Held(
            torch.cat((self.keys, other.keys), 2),
            torch.cat((self.values, other.values), 2),
            torch.cat((self.at, other.at), 1),
            torch.cat((self.real, other.real), 1),
        )

    def since(self, first: Tensor, always: int = 0) -> Held:
        """Copies of those at positions below `always`, or from first (B,) on in some row."""
        kept = ((self.at < always) | (self.at >= first[:, None])) & self.real
        slots = kept.any(0).nonzero()[:, 0]
        held = (x.index_select(2, slots) for x in (self.keys, self.values))
        return Held(*held, *(x.index_select(1, slots) for x in (self.at, self.real)))


def attend_held(q: Tensor, at: Tensor, first: Tensor, held: Held, always: int = 0) -> Tensor:
    """Attention of q (B, Hq, L, D) at positions `at` (B, L) to what is held, without padding.

    A token sees what is at its own position or before: from first (B, L) on, and below `always`.
    """
    # In decoding all that is held is seen, as a rule.
    near = (held.at >= first[:, -1:]) | (held.at < always)
    if bool((near & (held.at <= at[:, :1]) & held.real).all()):
        return ops.attend(q, held.keys, held.values)
    own = torch.arange(q.shape[2], device=q.device)
    mask = _since(at, first, held, always)
    return ops.attend(q, held.keys, held.values, mask=mask, q_pos=own)


def token_positions(
    seen: Tensor, length: int, valid: Tensor | None, before: int = 0
) -> tuple[Tensor, Tensor]:
    """Positions of `length` tokens after `seen` (B,) others and `before`, and which are real.

    Padding, at the end of rows only, has the position of the last real token.
    """
    index = torch.arange(length, device=seen.device).expand(len(seen), -1)
    if valid is None:
        return index + seen[:, None] + before, torch.ones_like(index, dtype=torch.bool)
    index = index.minimum(valid.sum(1, keepdim=True) - 1)
    return index + seen[:, None] + before, valid


def turned(x: Tensor, at: Tensor, theta: float | None) -> Tensor:
    """Heads x (B, H, L, D) rotated by positions `at` (B, L); as they are where theta is None."""
    return x if theta is None else ops.rope(x, *rotary(at, x.shape[-1], theta))


def _since(at: Tensor, first: Tensor, held: Held, always: int) -> Mask:
    """The mask of `attend_held`: queries and keys are named by where they are in the tensors."""
    keys, real = held.at, held.real
    full = bool(real.all())

    def look(table: Tensor, b: Tensor, i: Tensor) -> Tensor:
        return table[b, i.clamp(0, table.shape[1] - 1)]

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        key = look(keys, b, k)
        near = (key >= look(first, b, q)) | (key < always)
        return near & (key <= look(at, b, q)) & look(real, b, k)

    def bounds(b: Tensor, h: Tensor, *tile: Tensor) -> tuple[Tensor, Tensor]:
        """Positions ascend along queries and keys, and so does what a query sees first."""
        q_lo, q_hi, k_lo, k_hi = tile
        low, high = look(keys, b, k_lo), look(keys, b, k_hi)
        some = (high >= look(first, b, q_lo)) | (low < always)
        every = (low >= look(first, b, q_hi)) | (high < always)
        every = every & (high <= look(at, b, q_lo))
        return some & (low <= look(at, b, q_hi)), every if full else torch.zeros_like(every)

    return Mask(predicate, bounds, batch=at.shape[0], name="held(…)")
