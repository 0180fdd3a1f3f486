"""Recall that layers learn in a few hundred steps: nothing but pairs and questions in a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.bench.claims._toys import Recaller
from foveate.nn._stack import Stack
from foveate.tasks.batch import Batch
from foveate.tasks.mqar import mqar
from foveate.tasks.train import fit

# Tokens of which half are keys and half values.
_VOCABULARY = 64


def soon_recalled(
    patterns: Mapping[str, str],
    *,
    layers: int | None = None,
    pairs: int = 4,
    length: int = 32,
    dim: int = 32,
    heads: int = 2,
    steps: int = 300,
    lr: float = 1e-2,
) -> dict[str, float]:
    """Accuracy by name of stacks after a pattern, repeated up to `layers`, trained alike."""
    figures = {}
    for name, pattern in patterns.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Recaller([Stack(dim, pattern, layers=layers, heads=heads)], dim, _VOCABULARY)

        def loss(step: int, model: Recaller = model) -> Tensor:
            batch = _rows(32, step, pairs, length)
            return batch.loss(model(batch.inputs))

        fit(model.parameters(), loss, steps=steps, lr=lr)
        test = _rows(300, 1_000_000, pairs, length)
        with torch.no_grad():
            figures[f"accuracy, {name}"] = test.accuracy(model(test.inputs))
    return figures


def _rows(count: int, seed: int, pairs: int, length: int) -> Batch:
    """Pairs, then as many questions at even places, 0 between them."""
    options: dict[str, Any] = {"vocabulary": _VOCABULARY, "spread": 1.0, "filler": False}
    return mqar(count, seed=seed, pairs=pairs, length=length, **options)
