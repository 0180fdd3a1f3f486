"""What keys get and how they lie: statistics of the columns of attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate import ops
from foveate.hf.watch import Seen


def column_means(seen: Seen) -> Tensor:
    """Mean weight (B, Hq, Lk) that a key gets from the real rows that see it."""
    _, queries = seen.counts()
    return seen.columns()[..., 0] / queries.clamp_min(1)


def first_weight(seen: Seen, skip: int = 1) -> Tensor:
    """Mean weight (B, Hq) of a text's first real key over its real rows but the first `skip`."""
    real = seen.real_rows
    counted = (real & (real.cumsum(1) > skip))[:, None, :, None].to(seen.q)
    mass = left_aligned(seen.columns(counted)[..., 0], real)[..., 0]
    return mass / counted.sum((2, 3))


def row_averages(seen: Seen, u: Tensor) -> Tensor:
    """Mean (B, Hq, Lk, m) of numbers u (B, 1|Hq, Lq, m) over the real rows that see a key."""
    _, queries = seen.counts()
    # Logits that are all 0, and so are the normalisers: every row that sees a key weighs 1.
    lse = torch.zeros_like(seen.lse).masked_fill(~seen.real_rows[:, None], float("-inf"))
    total = ops.attend_T(
        torch.zeros_like(seen.q),
        torch.zeros_like(seen.k),
        lse,
        u,
        valid=seen.valid,
        mask=seen.mask,
        causal=seen.causal,
    )
    return total / queries.clamp_min(1)[..., None]


def uniform_means(seen: Seen) -> Tensor:
    """What `column_means` would be if every row looked at all it sees alike."""
    keys, _ = seen.counts()
    return row_averages(seen, 1 / keys[..., None].clamp_min(1))[..., 0]


def mean_cosines(seen: Seen) -> Tensor:
    """Mean cosine (B, Hq, Lk) of a key with the queries of the real rows that see it."""
    keys = normalize(seen.k, dim=-1).repeat_interleave(seen.q.shape[1] // seen.k.shape[1], 1)
    return (row_averages(seen, normalize(seen.q, dim=-1)) * keys).sum(-1)


def left_aligned(x: Tensor, real: Tensor) -> Tensor:
    """Numbers (B, …, L) of tokens with the real ones (B, L) of every text first."""
    order = torch.argsort((~real).int(), dim=1, stable=True)
    return x.gather(-1, order.view(len(x), *[1] * (x.dim() - 2), -1).expand_as(x))


def first_to_others(x: Tensor, real: Tensor) -> Tensor:
    """Numbers (B, …, L) of tokens: the first real one's over the mean of the others', (B, …).

    NaN for a text of one token.
    """
    counted = real.view(len(x), *[1] * (x.dim() - 2), -1)
    first = left_aligned(x, real)[..., 0]
    total = x.masked_fill(~counted, 0).sum(-1)
    return first * (counted.sum(-1) - 1) / (total - first)
