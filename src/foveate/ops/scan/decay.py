"""Products of tokens of a chunk under decay: every exponent is a sum of log-decays, so none is > 0.

Tokens are (…, C, ·), log-decays (…, C, 1|K|V), weights (…, C, C) with zeros above the diagonal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Decays of a chunk: from its start to a token, from a token to its end, and over all of it."""

    before: Tensor
    after: Tensor
    whole: Tensor


class _Level(NamedTuple):
    """Neighbouring blocks of `size` tokens (…, n, size, ·) about to be joined in pairs."""

    size: int
    early: Tensor
    """From a token of the first block of a pair to its end."""
    late: Tensor
    """From the start of the second block of a pair to a token of it."""


def token_products(x: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Factors]:
    """Weights x_i·k_j exp(b_i - b_j), b the running sum of one log-decay per token."""
    # Differences of a long float32 sum would lose digits.
    sums = decay.double().cumsum(-2)
    gaps = (sums - sums.mT).to(x.dtype)
    # Above the diagonal gaps are >= 0: taken out before the exponential can overflow.
    weights = ((x @ k.mT) * gaps.clamp(max=0.0).exp_()).tril_()
    last = sums[..., -1:, :]
    before, after, whole = (s.to(x.dtype).exp() for s in (sums, last - sums, last))
    return weights, Factors(before, after, whole)


def key_products(x: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Factors]:
    """Weights Σ_c x_ic k_jc exp(b_ic - b_jc), b the running sums of one log-decay per channel."""
    levels, factors = _levels(decay)
    weights = (x * k).sum(-1)[..., None, None]
    for size, early, late in levels:
        below = (_blocks(x, size)[1] * late) @ (_blocks(k, size)[0] * early).mT
        first, second = weights[..., 0::2, :, :], weights[..., 1::2, :, :]
        above = torch.zeros_like(first)
        weights = torch.cat((torch.cat((first, above), -1), torch.cat((below, second), -1)), -2)
    return weights[..., 0, :, :], factors


def value_products(weights: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, Factors]:
    """Sums Σ_{j≤i} weights_ij v_jc exp(b_ic - b_jc), b the running sums of the decays."""
    levels, factors = _levels(decay)
    out = weights.diagonal(dim1=-2, dim2=-1)[..., None] * v
    for size, early, late in levels:
        tiles = weights.unflatten(-1, (-1, 2 * size)).unflatten(-3, (-1, 2 * size))
        tiles = tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., size:, :size]
        added = (tiles @ (_blocks(v, size)[0] * early)) * late
        first, second = _blocks(out, size)
        out = torch.stack((first, second + added), -3).flatten(-4, -2)
    return out, factors


def _blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and second blocks (…, n, size, ·) of all pairs of neighbouring blocks."""
    first, second = x.unflatten(-2, (-1, 2, size)).unbind(-3)
    return first, second


def _levels(decay: Tensor) -> tuple[list[_Level], Factors]:
    """Decays within blocks of 1, 2, 4 … tokens; only sums are formed, never differences of sums."""
    levels = []
    before, after, size = decay, torch.zeros_like(decay), 1
    while size < decay.shape[-2]:
        (early, late), (first, second) = _blocks(after, size), _blocks(before, size)
        levels.append(_Level(size, early.exp(), second.exp()))
        total = first[..., -1:, :], second[..., -1:, :]
        before = torch.stack((first, second + total[0]), -3).flatten(-4, -2)
        after = torch.stack((early + total[1], late), -3).flatten(-4, -2)
        size *= 2
    return levels, Factors(before.exp(), after.exp(), before[..., -1:, :].exp())
