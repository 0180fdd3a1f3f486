"""CLEAR (2024, paper 266): attention inside a disc."""

from foveate import ops
from foveate.attention.sparse.clear import Clear
from foveate.bench.claims import Outcome
from foveate.bench.claims._grids import times_faster, tokens

CLAIM = "the time of attention inside a disc grows like the area of the image, not like its square"

_SMALL, _LARGE = 64, 128


def measure() -> Outcome:
    """An image of 128 x 128 over one of 64 x 64, radius 8: disc and dense attention."""
    small, large = tokens(_SMALL**2, 1), tokens(_LARGE**2, 1)
    disc, wide = (Clear(shape=(n, n), radius=8.0, tile=(8, 8)) for n in (_SMALL, _LARGE))
    gap = disc(*small, causal=False) - ops.attend(*small, mask=ops.disc((_SMALL, _SMALL), 8.0))
    growth = times_faster(
        lambda: wide(*large, causal=False), lambda: disc(*small, causal=False), rounds=9
    )
    figures = {
        "growth of the area": (_LARGE / _SMALL) ** 2,
        "growth of the time, disc": growth,
        "growth of the time, dense": times_faster(
            lambda: ops.attend(*large), lambda: ops.attend(*small)
        ),
        "times faster than dense": times_faster(
            lambda: ops.attend(*large), lambda: wide(*large, causal=False)
        ),
        "largest difference from masked dense": float(gap.abs().max()),
    }
    return Outcome(figures, growth < 6 and float(gap.abs().max()) < 1e-4)
