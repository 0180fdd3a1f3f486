"""A Systematic Analysis of Hybrid Linear Attention (2025, paper 273): what a ratio decides."""

from __future__ import annotations

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import soon_recalled, spoken
from foveate.nn.linear.hybrid_study import hybrid_pattern

CLAIM = "recall rises with the share of attention layers, the language loss hardly depends on it"

_RATIOS = {"no attention": None, "3 to 1": 3, "1 to 1": 1}


def measure() -> Outcome:
    """Four layers, linear ones of hgrn: recall of 4 pairs, and loss on bytes."""
    patterns = {name: hybrid_pattern(4, ratio, "hgrn") for name, ratio in _RATIOS.items()}
    figures = soon_recalled(patterns)
    pure, some, half = figures.values()
    losses = spoken(patterns, steps=80, layers=4, length=64)
    apart = max(losses.values()) - min(losses.values())
    figures |= losses | {"losses apart": apart}
    return Outcome(figures, pure < some < half and half > 0.5 and apart < 0.1)
