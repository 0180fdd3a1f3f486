"""Next tokens with distinct and common contexts: "Scan and Snap" (2023, paper 257)."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.tasks.batch import Batch, check_at_least


def context_table(
    *,
    vocabulary: int = 30,
    next_tokens: int = 2,
    last_tokens: int = 1,
    distinct: int = 6,
    common: int = 8,
    weights: tuple[float, float] = (0.5, 2.0),
    common_weight: float = 1.5,
) -> Tensor:
    """P(context token | last token m, next token n): (last_tokens, next_tokens, vocabulary).

    Next token n has `distinct` tokens of its own, n·distinct and on, with weights that rise from
    the first of `weights` to the second; they turn by a place from one last token to the next, so
    that pairs differ. The `common` tokens after them serve every pair. Rows sum to 1. Last token m
    is the id vocabulary - last_tokens + m, and never context; ids between stay unused.
    """
    check_at_least(1, next_tokens=next_tokens, last_tokens=last_tokens, distinct=distinct)
    check_at_least(0, common=common)
    own = next_tokens * distinct
    if own + common + last_tokens > vocabulary:
        raise ValueError(
            f"vocabulary must hold {own} distinct, {common} common and {last_tokens} last tokens: "
            f"at least {own + common + last_tokens}, got {vocabulary}"
        )
    if min(*weights, common_weight) <= 0:
        raise ValueError(f"weights must be above 0, got {weights} and {common_weight}")
    table = torch.zeros(last_tokens, next_tokens, vocabulary)
    rising = torch.linspace(*weights, distinct)
    for last in range(last_tokens):
        for following in range(next_tokens):
            at = following * distinct
            table[last, following, at : at + distinct] = rising.roll(last)
    table[..., own : own + common] = common_weight
    return table / table.sum(-1, keepdim=True)


def scan_snap(table: Tensor, rows: int, *, seed: int, length: int = 32) -> Batch:
    """Rows of `length` - 1 context tokens and a last token; its target is the next token.

    Last and next tokens are equally likely, context tokens independent draws from `table`, see
    `context_table`. Targets count the next tokens from 0: chance is 1 / next_tokens.
    """
    check_at_least(1, rows=rows)
    check_at_least(2, length=length)
    if table.dim() != 3 or (table < 0).any():
        raise ValueError(
            "table must be (last tokens, next tokens, vocabulary) without negative entries, "
            f"got {tuple(table.shape)}"
        )
    lasts, nexts, vocabulary = table.shape
    made = torch.Generator().manual_seed(seed)
    last = torch.randint(lasts, (rows,), generator=made)
    following = torch.randint(nexts, (rows,), generator=made)
    drawn = torch.multinomial(table[last, following], length - 1, True, generator=made)
    inputs = torch.cat((drawn, (vocabulary - lasts + last)[:, None]), 1)
    targets = torch.zeros_like(inputs)
    targets[:, -1] = following
    mask = torch.zeros_like(inputs, dtype=torch.bool)
    mask[:, -1] = True
    return Batch(inputs, targets, mask)
