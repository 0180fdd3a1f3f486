"""LongGen (2024, paper 277): a third of the layers full, the others windows."""

from __future__ import annotations

from functools import partial

from foveate.attention.sparse.longgen import LongGen
from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import accuracy, attending, judged, recall

CLAIM = "one full layer of three recalls from beyond the reach of windows, no full layer does not"

_LAYERS, _WINDOW, _TOKENS = 3, 4, 131_072


def measure() -> Outcome:
    """Accuracy on multi-query recall over 64 tokens, the middle layer full or none."""
    figures: dict[str, float] = {}
    for name, full in (("no layer", ()), ("the middle layer", (1,))):
        way = LongGen(full_layers=full, window=_WINDOW, sinks=1, block=_WINDOW)
        model = recall(partial(attending, way, layers=_LAYERS))
        figures[f"accuracy, {name} full"] = accuracy(model)
    none, hybrid = figures.values()
    served = LongGen()
    full_share = len(served.full(_LAYERS)) / _LAYERS
    near = (served.window + served.sinks) / _TOKENS
    figures["cache over full attention's, 128k tokens"] = full_share + (1 - full_share) * near
    return judged(figures, none < hybrid, hybrid)
