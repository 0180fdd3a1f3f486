"""Copying, and copying of what is marked: the tasks of "Unitary Evolution RNNs" and "Mamba"."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.tasks.batch import Batch, check_at_least

BLANK, MARK = 0, 1
"""Tokens that carry nothing, and those that ask for the next symbol."""


def copying(
    rows: int, *, seed: int, symbols: int = 8, delay: int = 32, vocabulary: int = 16
) -> Batch:
    """`symbols` random symbols, `delay` blanks, then a mark for each: its answer is the symbol.

    Symbols are in [2, vocabulary), drawn with repetition, so that guessing scores
    1 / (vocabulary - 2). Raises ValueError for sizes out of range.
    """
    made = _checked(rows, seed, symbols, delay, vocabulary)
    at = torch.arange(symbols).expand(rows, -1)
    return _asked(at, symbols + delay, vocabulary, made)


def selective_copying(
    rows: int, *, seed: int, symbols: int = 8, delay: int = 32, vocabulary: int = 16
) -> Batch:
    """`symbols` random symbols scattered among `delay` blanks, then a mark for each, in order.

    What has to be kept is told by the content alone, not by the position. Otherwise as `copying`.
    """
    made = _checked(rows, seed, symbols, delay, vocabulary)
    length = symbols + delay
    at = torch.rand(rows, length, generator=made).argsort(1)[:, :symbols].sort(1).values
    return _asked(at, length, vocabulary, made)


def _checked(rows: int, seed: int, symbols: int, delay: int, vocabulary: int) -> torch.Generator:
    """A generator for sizes that are in range."""
    check_at_least(1, rows=rows, symbols=symbols)
    check_at_least(0, delay=delay)
    check_at_least(4, vocabulary=vocabulary)
    return torch.Generator().manual_seed(seed)


def _asked(at: Tensor, length: int, vocabulary: int, made: torch.Generator) -> Batch:
    """Rows with symbols at (rows, symbols) of the first `length` tokens, and marks after them."""
    rows, symbols = at.shape
    drawn = torch.randint(2, vocabulary, (rows, symbols), generator=made)
    inputs = torch.full((rows, length + symbols), BLANK)
    inputs.scatter_(1, at, drawn)
    inputs[:, length:] = MARK
    targets = torch.zeros_like(inputs)
    targets[:, length:] = drawn
    return Batch(inputs, targets, (torch.arange(length + symbols) >= length).expand(rows, -1))
