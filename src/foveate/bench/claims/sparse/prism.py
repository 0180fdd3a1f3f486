"""Prism (2026, paper 158): two RoPE bands against one full-width mean."""

from foveate.attention.sparse.prism import Prism
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import judge

CLAIM = "at equal density, scores pooled in two RoPE bands keep more mass than full-width means"

_TOKENS, _BLOCK = 4096, 64


def measure() -> Outcome:
    """Retained mass and KL at p 0.9 against full-width pooling, interpolated to that density."""
    bands = judge(_TOKENS, Prism(block=_BLOCK, p=0.9))
    density, points = bands.density or 1.0, []
    for p in (0.95, 0.9, 0.85, 0.8, 0.7, 0.6):
        # One band of all dims, twice: no part of the head is scored apart, nothing is calibrated.
        way = judge(_TOKENS, Prism(block=_BLOCK, p=p, high=1.0, low=1.0, calibrate=False))
        points.append((way.density or 1.0, way.retained_mass or 1.0, way.kl))
        if len(points) > 1 and points[-1][0] <= density:
            break
    (above, *more), (below, *less) = points[-2:]
    share = (density - below) / (above - below)
    mass, kl = (y + share * (x - y) for x, y in zip(more, less, strict=True))
    figures = {
        "density": density,
        "retained mass, bands": bands.retained_mass or 1.0,
        "retained mass, means": mass,
        "KL, bands": bands.kl,
        "KL, means": kl,
    }
    return Outcome(figures, figures["retained mass, bands"] > mass)
