"""DeltaNet (2024, paper 283): recall of a state that overwrites."""

from __future__ import annotations

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import compared, pairs_and_questions, recalled_at_once

CLAIM = "with the delta rule a state recalls what linear attention and gates of its size do not"


def measure() -> Outcome:
    """Sixteen pairs within 64 tokens, one layer of 32 channels, 400 steps."""
    figures = recalled_at_once(
        {"deltanet": "deltanet:conv=1", "gla": "gla:expand_k=1.0", "linattn": "linattn"},
        pairs_and_questions(16, 128),
        vocabulary=128,
        steps=400,
    )
    deltanet, gla, linattn = figures.values()
    return compared(figures, deltanet > max(gla, linattn))
