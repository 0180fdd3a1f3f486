"""Generalized neighborhood attention (2025, paper 50): strides that fit the tiles."""

from functools import partial

from foveate import ops
from foveate.attention.sparse.gna import GNA
from foveate.bench.claims import Outcome
from foveate.bench.claims._grids import times_faster, tokens

CLAIM = "the more windows, strides and tiles fit together, the nearer speed comes to its bound"

_SIDE, _WINDOW, _TILE = 64, 16, (8, 8)


def measure() -> Outcome:
    """Speed-up over dense attention on a grid of 64 x 64, window 16, and what tiles would allow."""
    q, k, v = tokens(_SIDE**2)
    figures, gains = {}, []
    for stride in (1, 4, 8, 16):
        made = GNA(shape=(_SIDE, _SIDE), window=_WINDOW, stride=stride, tile=_TILE)
        layout = made.rule().to_layout(_SIDE**2, _SIDE**2, made.block)
        local = partial(made, q, k, v, causal=False)
        gain = times_faster(partial(ops.attend, q, k, v), local)
        gains.append(gain)
        figures[f"bound, stride {stride}"] = 1 / layout.density(causal=False)
        figures[f"times dense, stride {stride}"] = gain
    return Outcome(figures, gains[-1] > max(gains[:-1]) and gains[-1] > 1)
