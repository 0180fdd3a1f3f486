"""SpargeAttn (2025, paper 180): pooled scores are trusted only for self-similar blocks."""

from foveate.attention.sparse.spargeattn import SpargeAttn
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import judge

CLAIM = "reading blocks that are not self-similar whole loses less than trusting their mean"

_TOKENS = 4096


def measure() -> Outcome:
    """KL at theta 0.6, tau 0.9 against no theta, its tau raised to at least the same density."""
    judged = judge(_TOKENS, SpargeAttn(theta=0.6, tau=0.9))
    density, low, high = judged.density or 1.0, 0.9, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        reached = (judge(_TOKENS, SpargeAttn(theta=-1.0, tau=middle)).density or 1.0) >= density
        low, high = (low, middle) if reached else (middle, high)
    trusting = judge(_TOKENS, SpargeAttn(theta=-1.0, tau=high))
    figures = {
        "density, self-similar blocks only": density,
        "density, all blocks": trusting.density or 1.0,
        "KL, self-similar blocks only": judged.kl,
        "KL, all blocks": trusting.kl,
    }
    return Outcome(figures, judged.kl < trusting.kl)
