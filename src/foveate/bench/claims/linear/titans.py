"""Titans (2025, paper 51): what a memory holds that a window has lost."""

from __future__ import annotations

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import compared, soon_recalled

CLAIM = "a memory learned at test time recalls pairs that are outside of the window"

_PATTERNS = {
    "window alone": "softmax_attention:window=4",
    "memory as a gate": "titans:form=mag,window=4,depth=1,chunk=4",
    "memory alone": "titans:form=lmm,depth=1,chunk=4",
}


def measure() -> Outcome:
    """Recall of 4 pairs by one layer: a window of 4 tokens, the same beside a memory, a memory."""
    figures = soon_recalled(_PATTERNS, length=24)
    window, gate, alone = figures.values()
    return compared(figures, min(gate, alone) > window + 0.1)
