"""MoBA (2025, paper 189): trained with, block routing recalls what a window of its size cannot."""

from __future__ import annotations

from functools import partial

from foveate.attention.dense.dense import Dense
from foveate.attention.sparse.moba import MoBA
from foveate.attention.sparse.sink_window import SinkWindow
from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import accuracy, attending, judged, recall

CLAIM = "a model trained with routed blocks recalls like a dense one, above a window of equal size"

_BLOCK, _TOP = 4, 3


def measure() -> Outcome:
    """Accuracy on multi-query recall over 64 tokens after equal steps from equal weights."""
    ways = {
        "dense": Dense(),
        "moba": MoBA(block=_BLOCK, top_k=_TOP),
        "window": SinkWindow(sinks=0, window=_BLOCK * _TOP, block=_BLOCK),
    }
    figures = {
        f"accuracy, {name}": accuracy(recall(partial(attending, way))) for name, way in ways.items()
    }
    dense, moba, window = figures.values()
    return judged(figures, moba > window and moba > dense - 0.05, dense)
