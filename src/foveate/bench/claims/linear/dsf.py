"""Dynamical systems (2024, paper 24): recall with a normaliser learned from the input."""

from __future__ import annotations

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import compared, pairs_and_questions, recalled_at_once

CLAIM = "a normaliser learned from the input narrows the gap from linear attention to softmax"


def measure() -> Outcome:
    """Eight pairs within 32 tokens, one layer of 32 channels, 300 steps."""
    figures = recalled_at_once(
        {"linattn": "linattn", "normalised by input": "dsf", "softmax": "dense"},
        pairs_and_questions(8),
    )
    linear, normalised, softmax = figures.values()
    return compared(figures, linear < normalised and linear < softmax)
