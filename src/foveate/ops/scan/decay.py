"""Products of tokens of a chunk under decay: every exponent is a sum of log-decays, so none is > 0.

Tokens are (…, C, ·), log-decays (…, C, 1|K|V), weights (…, C, C) with zeros above the diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Decays of a chunk: from its start to a token, from a token to its end, and over all of it."""

    before: Tensor
    after: Tensor
    whole: Tensor


def token_products(
    rows: Sequence[Tensor], k: Tensor, decay: Tensor
) -> tuple[list[Tensor], Factors]:
    """Weights x_i·k_j exp(b_i - b_j) for each x of rows, b the running sum of the log-decays."""
    # Differences of a long float32 sum would lose digits.
    sums = decay.double().cumsum(-2)
    # Above the diagonal the exponents are >= 0: taken out before one can overflow.
    kept = (sums - sums.mT).to(k.dtype).tril_().exp_()
    weights = [((x @ k.mT) * kept).tril_() for x in rows]
    last = sums[..., -1:, :]
    before, after, whole = (s.to(k.dtype).exp() for s in (sums, last - sums, last))
    return weights, Factors(before, after, whole)


def key_products(rows: Sequence[Tensor], k: Tensor, decay: Tensor) -> tuple[list[Tensor], Factors]:
    """Weights Σ_c x_ic k_jc exp(b_ic - b_jc), like `token_products`, one decay per channel."""
    levels, factors = _levels(decay)
    weights = [x.new_zeros(*x.shape[:-1], x.shape[-2]) for x in rows]
    for x, weight in zip(rows, weights, strict=True):
        weight.diagonal(dim1=-2, dim2=-1).copy_((x * k).sum(-1))
    for size, early, late in levels:
        keys = (_blocks(k, size, 0) * early).mT
        for x, weight in zip(rows, weights, strict=True):
            _below(weight, size).copy_((_blocks(x, size, 1) * late) @ keys)
    return weights, factors


def value_products(weights: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, Factors]:
    """Sums Σ_{j≤i} weights_ij v_jc exp(b_ic - b_jc), b the running sums of the decays."""
    levels, factors = _levels(decay)
    out = weights.diagonal(dim1=-2, dim2=-1)[..., None] * v
    for size, early, late in levels:
        added = _below(weights, size) @ (_blocks(v, size, 0) * early)
        _blocks(out, size, 1).addcmul_(added, late)
    return out, factors


def _blocks(x: Tensor, size: int, which: int) -> Tensor:
    """The first (0) or second (1) blocks (…, n, size, ·) of all pairs of neighbouring blocks."""
    return x.unflatten(-2, (-1, 2, size))[..., which, :, :]


def _below(weights: Tensor, size: int) -> Tensor:
    """The weights (…, n, size, size) of second blocks for the first ones of their pairs."""
    pairs = weights.unflatten(-1, (-1, 2 * size)).unflatten(-3, (-1, 2 * size))
    return pairs.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., size:, :size]


def _levels(decay: Tensor) -> tuple[list[tuple[int, Tensor, Tensor]], Factors]:
    """Decays within pairs of blocks of 1, 2, 4 … tokens, and those of the whole chunk.

    For every size: from a token of a first block to its end, and from the start of a second block
    to a token of it. Only sums are formed, never differences of sums.
    """
    levels, size = [], 1
    before, after = decay.clone(), torch.zeros_like(decay)
    while size < decay.shape[-2]:
        first, second, early = (
            _blocks(before, size, 0),
            _blocks(before, size, 1),
            _blocks(after, size, 0),
        )
        levels.append((size, early.exp(), second.exp()))
        early += second[..., -1:, :]
        second += first[..., -1:, :]
        size *= 2
    return levels, Factors(before.exp(), after.exp(), before[..., -1:, :].exp())
