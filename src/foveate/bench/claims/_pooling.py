"""Classifiers that pool a sentence by attention, for claims about what attention shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.tasks.planted_token import PADDING, Planted
from foveate.tasks.train import fit


class Pooler(nn.Module):
    """Embedding, an LSTM both ways if `mixing`, additive attention, a linear layer of two classes.

    Without the LSTM a token's state holds that token alone.
    """

    def __init__(self, *, mixing: bool = True, vocabulary: int = 500, dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim, PADDING)
        self.lstm = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True) if mixing else None
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))
        self.head = nn.Linear(dim, 2)

    def states(self, embedded: Tensor) -> Tensor:
        """States (n, L, dim) of embedded tokens."""
        return embedded if self.lstm is None else self.lstm(embedded)[0]

    def logits(self, states: Tensor, valid: Tensor) -> Tensor:
        """Attention logits (n, L), -inf at padding."""
        scores: Tensor = self.score(states)[..., 0]
        return scores.masked_fill(~valid, float("-inf"))

    def classify(self, states: Tensor, logits: Tensor) -> Tensor:
        """Class logits (n, 2)."""
        classes: Tensor = self.head(torch.einsum("nl,nld->nd", logits.softmax(-1), states))
        return classes


Objective = Callable[[Pooler, Planted, Tensor, Tensor, int], Tensor]
"""The loss () of a model on sentences, their states and attention logits, at a step."""


def train(
    objective: Objective, data: Callable[[int], Planted], *, steps: int, mixing: bool = True
) -> Pooler:
    """A model, made from the same random numbers, trained on the sentences of every step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Pooler(mixing=mixing)

    def loss(step: int) -> Tensor:
        batch = data(step)
        states = model.states(model.embed(batch.inputs))
        return objective(model, batch, states, model.logits(states, batch.valid), step)

    fit(model.parameters(), loss, steps=steps, lr=5e-3)
    return model.eval()


def supervised(
    model: Pooler, batch: Planted, states: Tensor, logits: Tensor, step: int = 0
) -> Tensor:
    """Mean cross-entropy of the labelled sentences."""
    return cross_entropy(model.classify(states, logits), batch.labels, ignore_index=-1)


@torch.no_grad()
def attended(model: Pooler, test: Planted) -> tuple[float, Tensor]:
    """Accuracy on sentences, and their attention weights (n, L)."""
    states = model.states(model.embed(test.inputs))
    logits = model.logits(states, test.valid)
    return test.accuracy(model.classify(states, logits)), logits.softmax(-1)


def gradient_agreement(model: Pooler, test: Planted) -> float:
    """Mean over sentences of Pearson's r of attention and the size of gradients of embeddings."""
    embedded = model.embed(test.inputs).detach().requires_grad_()
    states = model.states(embedded)
    logits = model.logits(states, test.valid)
    loss = cross_entropy(model.classify(states, logits), test.truth, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, embedded)
    pairs = zip(gradient.norm(dim=-1), logits.detach().softmax(-1), test.valid, strict=True)
    each = [torch.corrcoef(torch.stack((g[at], p[at])))[0, 1] for g, p, at in pairs]
    return float(torch.stack(each).nanmean())
