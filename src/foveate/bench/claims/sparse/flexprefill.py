"""FlexPrefill (2025, paper 0): a budget that follows the head and the prompt."""

from foveate.attention.sparse.flexprefill import FlexPrefill
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import judge

CLAIM = "budgets that adapt to head and prompt lose less than one fixed budget of equal density"

_TOKENS, _BLOCK = 4096, 64


def measure() -> Outcome:
    """KL at gamma 0.9 against a fixed number of blocks a head, set to at least the same density."""
    adaptive = judge(_TOKENS, FlexPrefill(gamma=0.9, block=_BLOCK, min_budget=256))
    density = adaptive.density or 1.0
    fixed = adaptive
    for budget in range(128, _TOKENS, 64):
        # No share of the mass decides here: every head keeps its smallest and largest budget.
        same = FlexPrefill(gamma=0.9, tau=0.0, block=_BLOCK, min_budget=budget, max_budget=budget)
        fixed = judge(_TOKENS, same)
        if (fixed.density or 1.0) >= density:
            break
    figures = {
        "density, adaptive": density,
        "density, fixed": fixed.density or 1.0,
        "KL, adaptive": adaptive.kl,
        "KL, fixed": fixed.kl,
    }
    return Outcome(figures, adaptive.kl < fixed.kl)
