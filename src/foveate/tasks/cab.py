"""Four patterns of attention at small scale: "CAB: Comprehensive Attention Benchmark" (2022,
paper 58).

Its tasks take days; these take minutes: noncausal self-attention is `masked_periodic`, causal
self-attention `mqar`, noncausal cross-attention `cross_retrieval`, causal cross-attention
`reversal`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveate.tasks.batch import check_at_least

TASKS = {
    "noncausal self": "masked_periodic",
    "causal self": "mqar",
    "noncausal cross": "cross_retrieval",
    "causal cross": "reversal",
}
"""The task of every pattern."""


class CrossBatch(NamedTuple):
    """Rows with a context: inputs (n, Lq), context (n, Lk), targets (n, Lq)."""

    inputs: Tensor
    context: Tensor
    targets: Tensor

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy of logits (n, Lq, vocabulary)."""
        return cross_entropy(logits.flatten(0, 1), self.targets.flatten())

    def accuracy(self, logits: Tensor) -> float:
        """Share of positions whose largest logit is the target's."""
        return float((logits.argmax(-1) == self.targets).float().mean())


def cross_retrieval(rows: int, *, seed: int, pairs: int = 8, vocabulary: int = 64) -> CrossBatch:
    """A context of key-value pairs, and its keys in another order: the answers are their values.

    A pair is one token of the context, key · vocabulary + value; queries are keys. Keys and values
    are below `vocabulary`, keys distinct in a row; guessing among a row's values scores 1 / pairs.
    Raises ValueError for sizes that do not fit together.
    """
    check_at_least(1, rows=rows, pairs=pairs)
    if vocabulary < pairs:
        raise ValueError(f"vocabulary must hold {pairs} distinct keys, got {vocabulary}")
    made = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.rand(rows, vocabulary, generator=made).argsort(1)[:, :pairs] for _ in range(2)
    )
    order = torch.rand(rows, pairs, generator=made).argsort(1)
    return CrossBatch(keys.gather(1, order), keys * vocabulary + values, values.gather(1, order))


def reversal(rows: int, *, seed: int, length: int = 16, vocabulary: int = 16) -> CrossBatch:
    """A context of random tokens, to be given out from its end, each step told the one before.

    Inputs are the targets one step late, after the start token `vocabulary`; the context has as
    many tokens as there are steps. Raises ValueError for sizes out of range.
    """
    check_at_least(1, rows=rows, length=length)
    check_at_least(2, vocabulary=vocabulary)
    made = torch.Generator().manual_seed(seed)
    context = torch.randint(vocabulary, (rows, length), generator=made)
    targets = context.flip(1)
    start = torch.full((rows, 1), vocabulary)
    return CrossBatch(torch.cat((start, targets[:, :-1]), 1), context, targets)


def compositional_index(
    scores: Mapping[str, Mapping[str, float]], lower_is_better: frozenset[str] = frozenset()
) -> dict[str, float]:
    """One figure for each mechanism: how many deviations it is above average, mean over tasks.

    scores[task][mechanism]; a mechanism that lacks a task is averaged over those it has, one that
    has none is left out. Tasks with less than two mechanisms, or no spread, tell nothing. Raises
    ValueError for a score that is no number.
    """
    above: dict[str, list[float]] = {}
    for task, row in scores.items():
        if any(not math.isfinite(x) for x in row.values()):
            raise ValueError(f"scores of {task} must be numbers, got {dict(row)}")
        if len(row) < 2:
            continue
        found = torch.tensor(list(row.values()), dtype=torch.float64)
        spread = float(found.std(correction=0))
        if spread == 0:
            continue
        sign = -1.0 if task in lower_is_better else 1.0
        for name, x in row.items():
            above.setdefault(name, []).append(sign * (x - float(found.mean())) / spread)
    return {name: sum(z) / len(z) for name, z in above.items()}
