"""Periodic rows with masked tokens, the best guess, and unmasking in steps.

"Revealing the Attention Floating Mechanism in Masked Diffusion Models" (2026, paper 192).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from foveate.tasks.batch import Batch, check_at_least


def masked_periodic(
    rows: int,
    *,
    seed: int,
    length: int = 32,
    vocabulary: int = 16,
    periods: tuple[int, int] = (3, 7),
    masked: tuple[float, float] = (0.15, 0.5),
) -> Batch:
    """Rows that repeat a random block, in part behind the mask token `vocabulary`.

    The block's length is one of `periods`, first to last, its tokens independent; the masked share
    lies between both of `masked`, rounded to tokens, at least one. The masked positions count.
    """
    check_at_least(1, rows=rows, length=length)
    check_at_least(2, vocabulary=vocabulary)
    if not 1 <= periods[0] <= periods[1] <= length:
        raise ValueError(f"periods must rise from 1 to at most the length {length}, got {periods}")
    if not 0 < masked[0] <= masked[1] <= 1:
        raise ValueError(f"masked must rise from above 0 to at most 1, got {masked}")
    made = torch.Generator().manual_seed(seed)
    period = torch.randint(periods[0], periods[1] + 1, (rows, 1), generator=made)
    block = torch.randint(vocabulary, (rows, periods[1]), generator=made)
    targets = block.gather(1, torch.arange(length).expand(rows, -1) % period)
    share = masked[0] + (masked[1] - masked[0]) * torch.rand(rows, 1, generator=made)
    count = (share * length).round().clamp_min(1)
    mask = torch.rand(rows, length, generator=made).argsort(1).argsort(1) < count
    return Batch(targets.masked_fill(mask, vocabulary), targets, mask)


def posterior(inputs: Tensor, *, vocabulary: int = 16, periods: tuple[int, int] = (3, 7)) -> Tensor:
    """What is known of every token (n, L, vocabulary) of rows (n, L) in part masked: Bayes' rule.

    A period fits when visible tokens of the same place in the block agree, and is then as likely as
    vocabulary^-(places seen). The largest entry's mean over masked positions is the best accuracy.
    """
    length = inputs.shape[1]
    seen = one_hot(inputs, vocabulary + 1)[..., :vocabulary].double()
    total, weight = torch.zeros_like(seen), seen.new_zeros(len(inputs), 1, 1)
    for period in range(periods[0], periods[1] + 1):
        place = torch.arange(length) % period
        blocks = seen.new_zeros(len(inputs), period, vocabulary).index_add_(1, place, seen)
        blocks = (blocks > 0).double()
        kinds = blocks.sum(-1)  # different tokens seen at a place
        fits = (kinds <= 1).all(-1) * float(vocabulary) ** -kinds.sum(-1)
        known = torch.where(kinds[..., None] > 0, blocks, 1 / vocabulary)
        total += fits[:, None, None] * known[:, place]
        weight += fits[:, None, None]
    if (weight == 0).any():
        raise ValueError(f"some rows have none of the periods {periods[0]} to {periods[1]}")
    return total / weight


def unmask(
    predict: Callable[[Tensor], Tensor], inputs: Tensor, *, steps: int, mask_token: int = 16
) -> list[Tensor]:
    """The rows (n, L) before and after each of `steps` steps, the last without a masked token.

    A step fills, in every row, the masked positions where `predict`, rows (n, L) -> logits
    (n, L, vocabulary), is surest, each with its likeliest token: as many as leave every later step
    the same number, the first ones one more.
    """
    check_at_least(1, steps=steps)
    states = [inputs]
    for step in range(steps):
        rows = states[-1]
        masked = rows == mask_token
        sure, token = predict(rows).softmax(-1).max(-1)
        rank = sure.masked_fill(~masked, -1).argsort(dim=1, descending=True, stable=True).argsort(1)
        count = torch.ceil(masked.sum(1, keepdim=True) / (steps - step))
        states.append(torch.where(masked & (rank < count), token, rows))
    return states
