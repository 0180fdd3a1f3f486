"""Bigrams with tokens that copy back: "Active-Dormant Attention Heads" (2024, paper 54)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveate.tasks.batch import Batch, check_at_least


class Chain(NamedTuple):
    """A Markov chain over V tokens with triggers.

    transition (V + 1, V) float64: row V is what follows the start token V, the stationary
    distribution without the triggers. triggers (K,) are the most frequent tokens.
    """

    transition: Tensor
    triggers: Tensor

    @property
    def start(self) -> int:
        """The token that all rows start with."""
        return self.transition.shape[1]

    def is_trigger(self, batch: Batch) -> Tensor:
        """Positions (n, L) whose token is a trigger, so that the one before it comes next."""
        return torch.isin(batch.inputs, self.triggers)

    def excess(self, batch: Batch, logits: Tensor) -> tuple[float, float]:
        """Loss on the triggers, and loss less the chain's entropy on all other positions.

        logits (n, L, at least V). A model that knows the task has 0 and, on average, 0.
        """
        trigger = self.is_trigger(batch)
        losses = cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
        entropy = torch.special.entr(self.transition).sum(1)[batch.inputs]
        return float(losses[trigger].mean()), float((losses - entropy)[~trigger].mean())


def chain(transition: Tensor, *, triggers: int = 3) -> Chain:
    """The chain of a transition matrix (V, V) whose `triggers` most frequent tokens copy back.

    Raises ValueError for rows that are no distributions or when no token is left to begin with.
    """
    rows = transition.double()
    size = len(rows)
    if rows.shape != (size, size) or (rows < 0).any() or ((rows.sum(1) - 1).abs() > 1e-6).any():
        raise ValueError(
            f"transition must be square with rows that sum to 1, got {tuple(rows.shape)} with sums "
            f"from {float(rows.sum(-1).min()):.3g} to {float(rows.sum(-1).max()):.3g}"
        )
    check_at_least(1, triggers=triggers)
    if triggers >= size:
        raise ValueError(f"triggers must be fewer than the {size} tokens, got {triggers}")
    stationary = _stationary(rows)
    chosen = stationary.topk(triggers).indices
    first = stationary.index_fill(0, chosen, 0)
    return Chain(torch.cat((rows, first[None] / first.sum())), chosen)


def dirichlet_chain(
    vocabulary: int = 32, *, seed: int, triggers: int = 3, concentration: float = 0.3
) -> Chain:
    """A chain whose rows are drawn from a symmetric Dirichlet distribution."""
    check_at_least(2, vocabulary=vocabulary)
    if concentration <= 0:
        raise ValueError(f"concentration must be above 0, got {concentration}")
    alpha = np.full(vocabulary, concentration)
    rows = np.random.default_rng(seed).dirichlet(alpha, size=vocabulary)
    return chain(torch.from_numpy(rows), triggers=triggers)


def bigram_backcopy(chain: Chain, rows: int, *, seed: int, length: int = 48) -> Batch:
    """Rows of `length` tokens of the chain after its start token; the next token is the target.

    After a trigger comes the token before it, else a draw from the chain; every position counts.
    """
    check_at_least(1, rows=rows)
    check_at_least(2, length=length)
    made = torch.Generator().manual_seed(seed)
    tokens = torch.full((rows, length + 1), chain.start)
    for i in range(1, length + 1):
        now = tokens[:, i - 1]
        drawn = torch.multinomial(chain.transition[now], 1, generator=made)[:, 0]
        back = torch.isin(now, chain.triggers)
        tokens[:, i] = torch.where(back, tokens[:, max(i - 2, 0)], drawn)
    inputs = tokens[:, :-1]
    return Batch(inputs, tokens[:, 1:], torch.ones_like(inputs, dtype=torch.bool))


def _stationary(rows: Tensor) -> Tensor:
    """The distribution (V,) that a step leaves as it is."""
    size = len(rows)
    leaves = torch.cat((rows.T - torch.eye(size, dtype=rows.dtype), rows.new_ones(1, size)))
    target = rows.new_zeros(size + 1)
    target[-1] = 1
    return torch.linalg.lstsq(leaves, target[:, None]).solution[:, 0].clamp_min(0)
