"""MoBA (2025, paper 189): trained with, block routing recalls what a window of its size cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.base import Attention
from foveate.attention.dense.dense import Dense
from foveate.attention.sparse.moba import MoBA
from foveate.attention.sparse.sink_window import SinkWindow
from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import toy
from foveate.hf.attach import attach
from foveate.tasks.mqar import Batch, mqar
from foveate.tasks.train import fit

CLAIM = "a model trained with routed blocks recalls like a dense one, above a window of equal size"

_LENGTH, _PAIRS, _VOCABULARY, _BLOCK, _TOP, _STEPS = 512, 8, 1024, 32, 3, 300


def measure() -> Outcome:
    """Accuracy on multi-query recall over 512 tokens after equal steps from equal weights."""
    ways = {
        "dense": Dense(),
        "moba": MoBA(block=_BLOCK, top_k=_TOP),
        "window": SinkWindow(sinks=0, window=_BLOCK * _TOP, block=_BLOCK),
    }
    figures = {f"accuracy, {name}": _accuracy(way) for name, way in ways.items()}
    dense, moba, window = figures.values()
    return Outcome(figures, moba > window and moba > dense - 0.05)


def _accuracy(mechanism: Attention) -> float:
    """Of a two-layer model trained and tested under a mechanism."""
    model = toy(vocabulary=_VOCABULARY, length=_LENGTH, width=64, heads=1)

    def rows(seed: int, count: int) -> Batch:
        # Uniformly spread questions: most are asked far from the pairs.
        options = {"length": _LENGTH, "pairs": _PAIRS, "vocabulary": _VOCABULARY}
        return mqar(count, seed=seed, spread=1.0, filler=False, **options)

    def loss(step: int) -> Tensor:
        batch = rows(step, 16)
        return batch.loss(model(batch.inputs).logits)

    with attach(model, prefill=mechanism):
        fit(model.parameters(), loss, steps=_STEPS, lr=3e-3)
        test = rows(100_000, 100)
        with torch.no_grad():
            return test.accuracy(model(test.inputs).logits)
