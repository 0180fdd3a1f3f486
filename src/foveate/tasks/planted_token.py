"""Sentences whose class is decided by planted words.

"Attention Meets Perturbations" (2020, paper 136), "Learning to Deceive with Attention-Based
Explanations" (2019, paper 247) and "Making Attention Mechanisms More Robust and Interpretable with
Virtual Adversarial Training" (2021, paper 259).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.tasks.batch import check_at_least

PADDING = 0


class Planted(NamedTuple):
    """Sentences: inputs (n, L) padded with 0 at the end, valid (n, L) bool, the class of each (n,).

    `labels` are for training: noisy where asked for, -1 where there is none. `truth` is the class,
    1 or 0. `planted` (n, L) bool is where the words stand that decide it.
    """

    inputs: Tensor
    valid: Tensor
    labels: Tensor
    truth: Tensor
    planted: Tensor

    def accuracy(self, logits: Tensor) -> float:
        """Share of sentences whose larger logit, of logits (n, 2), is that of their class."""
        return float((logits.argmax(-1) == self.truth).float().mean())

    def mass(self, weights: Tensor) -> Tensor:
        """Attention weights (…, n, L) on planted words, summed: (…, n)."""
        return (weights * self.planted).sum(-1)


def planted_token(
    rows: int,
    *,
    seed: int,
    words: int = 5,
    hint: float | None = None,
    noise: float = 0.0,
    labelled: int | None = None,
    lengths: tuple[int, int] = (20, 40),
    vocabulary: int = 500,
) -> Planted:
    """Sentences of random words with one to three words of their class at random places.

    Tokens 1 to `words` are the positive words, the next `words` the negative ones: 1 gives a pair
    like "he" and "she". With a `hint` every sentence also has one of two tokens after those, and it
    tells the class with that probability: all that is left to a model that must not look at the
    planted words. The classes are equally likely; `noise` is the share of labels turned over at
    random; only the first `labelled` rows have a label. Raises ValueError for sizes out of range.
    """
    check_at_least(1, rows=rows, words=words)
    shortest, longest = lengths
    if not 4 <= shortest <= longest:
        raise ValueError(f"lengths must rise from at least 4, got {lengths}")
    plain = 2 * words + (3 if hint is not None else 1)
    if plain >= vocabulary:
        raise ValueError(f"vocabulary must be above {plain}, got {vocabulary}")
    for name, share in (("noise", noise), ("hint", hint or 0.0)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    labelled = rows if labelled is None else labelled
    if not 0 <= labelled <= rows:
        raise ValueError(f"labelled must be from 0 to the {rows} rows, got {labelled}")
    made = torch.Generator().manual_seed(seed)

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=made)

    truth = below(2, rows)
    valid = torch.arange(longest) < shortest + below(longest - shortest + 1, rows)[:, None]
    inputs = plain + below(vocabulary - plain, rows, longest)
    rank = torch.rand(rows, longest, generator=made).masked_fill(~valid, 2).argsort(1).argsort(1)
    planted = rank <= below(3, rows)[:, None]  # ranks are random: the first one to three places
    own = 1 + (1 - truth)[:, None] * words + below(words, rows, longest)
    inputs = torch.where(planted, own, inputs)
    if hint is not None:
        tells = torch.where(torch.rand(rows, generator=made) < hint, truth, 1 - truth)
        inputs = torch.where(rank == 3, 1 + 2 * words + tells[:, None], inputs)
    labels = torch.where(torch.rand(rows, generator=made) < noise, 1 - truth, truth)
    labels[labelled:] = -1
    return Planted(inputs.masked_fill(~valid, PADDING), valid, labels, truth, planted)
