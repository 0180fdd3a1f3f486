"""Gated linear attention (2023): gates against a fixed decay and none."""

from __future__ import annotations

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import spoken

CLAIM = "gates that depend on the input model text better than a fixed decay, and that than none"


def measure() -> Outcome:
    """Two layers of 64 channels, states of one size, 150 steps of 8 rows of 128 bytes of text."""
    figures = spoken(
        {"gla": "gla:expand_k=1.0", "retnet": "retnet:expand_v=1.0", "linattn": "linattn"},
        steps=150,
    )
    gla, retnet, linattn = figures.values()
    return Outcome(figures, gla < retnet < linattn)
