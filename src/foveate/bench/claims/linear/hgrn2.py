"""HGRN2 (2024): recall against the size of the state."""

from __future__ import annotations

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import compared, pairs_and_questions, recalled_at_once

CLAIM = "with the same parameters, recall rises with the size of the state"


def measure() -> Outcome:
    """Eight pairs within 32 tokens: heads of 4, 8 and 16 channels, which are also their keys.

    One layer with the bounds of the last of four.
    """
    figures = recalled_at_once(
        {f"keys of {32 // heads}": f"hgrn2:heads={heads},index=3,layers=4" for heads in (8, 4, 2)},
        pairs_and_questions(8),
    )
    small, middle, large = figures.values()
    return compared(figures, small < middle < large)
