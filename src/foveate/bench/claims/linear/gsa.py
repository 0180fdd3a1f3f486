"""Gated slot attention (2024, paper 245): recall beside a plain state of the same size."""

from __future__ import annotations

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import compared, pairs_and_questions, recalled_at_once

CLAIM = "slots read by softmax recall more than a gated state of as many numbers"


def measure() -> Outcome:
    """Eight pairs within 32 tokens, one layer of 32 channels with a state of 1,024 numbers."""
    figures = recalled_at_once(
        {"gsa, 16 slots": "gsa:slots=16", "gla": "gla:expand_k=1.0"},
        pairs_and_questions(8),
        steps=600,
    )
    gsa, gla = figures.values()
    # Two standard errors of a share of 2,400 answers.
    return compared(figures, gsa > gla + 0.02)
