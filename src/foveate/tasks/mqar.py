"""Multi-query associative recall: "Zoology" (2023, paper 295)."""

from __future__ import annotations

import torch

from foveate.tasks.batch import Batch, check_at_least


def mqar(
    rows: int,
    *,
    seed: int,
    length: int = 64,
    pairs: int = 8,
    vocabulary: int = 256,
    spread: float = 0.01,
    passes: int = 1,
    filler: bool = True,
) -> Batch:
    """Key-value pairs, then every key once more: the answer at its position is its value.

    Keys are in [1, vocabulary / 2), values in [vocabulary / 2, vocabulary), both distinct in a
    row; the block of pairs stands `passes` times at the start. The rest is slots of two tokens;
    slot g asks with weight (g + 1)^(spread - 1), so that 1 is uniform and less is nearer to the
    pairs. Other tokens are random ones of the whole vocabulary, or 0 without `filler`. Guessing
    among the row's values scores 1 / pairs. Raises ValueError for sizes that do not fit together.
    """
    half, start = vocabulary // 2, 2 * pairs * passes
    slots = (length - start) // 2
    _check(rows, length, pairs, vocabulary, spread, passes, slots)
    made = torch.Generator().manual_seed(seed)
    keys = torch.rand(rows, half - 1, generator=made).argsort(1)[:, :pairs] + 1
    values = torch.rand(rows, vocabulary - half, generator=made).argsort(1)[:, :pairs] + half
    weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (spread - 1)
    asked = torch.multinomial(weights.expand(rows, -1), pairs, generator=made)
    at = start + 2 * asked
    inputs = torch.zeros(rows, length, dtype=torch.long)
    inputs[:, :start] = torch.stack((keys, values), -1).flatten(1).repeat(1, passes)
    inputs.scatter_(1, at, keys)
    targets = torch.zeros_like(inputs).scatter_(1, at, values)
    if filler:
        noise = torch.randint(vocabulary, inputs.shape, generator=made)
        inputs = torch.where(inputs == 0, noise, inputs)
    return Batch(inputs, targets, targets > 0)


def _check(
    rows: int, length: int, pairs: int, vocabulary: int, spread: float, passes: int, slots: int
) -> None:
    """Refuse sizes that do not fit together."""
    check_at_least(1, rows=rows, pairs=pairs, passes=passes)
    if spread <= 0:
        raise ValueError(f"spread must be above 0, got {spread}")
    if length % 2 or slots < pairs:
        raise ValueError(
            f"length must be even and hold {pairs} pairs {passes} times and {pairs} questions: "
            f"at least {2 * pairs * (passes + 1)}, got {length}"
        )
    if vocabulary <= length or vocabulary // 2 - 1 < pairs:
        raise ValueError(
            f"vocabulary must be above the length {length} and hold {pairs} distinct keys, "
            f"got {vocabulary}"
        )
