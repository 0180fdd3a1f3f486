"""Rows of tokens with the tokens to predict, and the checks that all tasks share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import cross_entropy


class Batch(NamedTuple):
    """Rows of a task: inputs (n, L), targets (n, L), and which positions count (n, L) bool."""

    inputs: Tensor
    targets: Tensor
    mask: Tensor

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy of logits (n, L, vocabulary) where targets count."""
        return cross_entropy(logits[self.mask], self.targets[self.mask])

    def accuracy(self, logits: Tensor) -> float:
        """Share of counting positions whose largest logit is the target's."""
        return float((logits.argmax(-1) == self.targets)[self.mask].float().mean())


def check_at_least(least: float, **values: float) -> None:
    """Refuse, by name, a value below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not among `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
