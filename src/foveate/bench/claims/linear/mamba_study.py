"""An Empirical Study of Mamba-based Language Models (2024, paper 317): who can use a phone book."""

from __future__ import annotations

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import compared, soon_recalled
from foveate.nn.linear.mamba_study import parse_hybrid

CLAIM = "state spaces look up worse than attention, and one attention layer makes up for it"

_MODELS = {"Mamba-2 alone": "M-M-", "one attention layer": "M-*-", "Transformer": "*-*-"}


def measure() -> Outcome:
    """Recall of 4 pairs by two mixers and two MLPs; states of 4 numbers a channel."""
    mamba = "mamba2:states=4,expand=1"
    patterns = {name: parse_hybrid(symbols, mamba) for name, symbols in _MODELS.items()}
    figures = soon_recalled(patterns, steps=500)
    alone, hybrid, full = figures.values()
    return compared(figures, alone < min(hybrid, full) - 0.1)
