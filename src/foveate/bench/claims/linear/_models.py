"""What claims of sequence layers share: recall by layer, and small language models of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import held_out_loss, trained_on_bytes
from foveate.bench.recall.learn import Recall, learn
from foveate.nn import Transformer


def recalled(patterns: Mapping[str, str], **task: Any) -> dict[str, float]:
    """Accuracy by name of models whose layers follow a pattern, trained alike."""
    return {
        f"accuracy, {name}": learn(pattern, Recall(**task)).accuracy
        for name, pattern in patterns.items()
    }


def spoken(
    patterns: Mapping[str, str],
    *,
    dim: int = 64,
    layers: int = 2,
    heads: int = 4,
    length: int = 128,
    steps: int = 200,
    test_length: int | None = None,
) -> dict[str, float]:
    """Nats a held-out byte of language models whose layers follow a pattern, trained alike."""
    figures = {}
    for name, pattern in patterns.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Transformer(256, dim, pattern, layers=layers, heads=heads, tie=False)
        trained_on_bytes(model, length=length, steps=steps)
        figures[f"loss, {name}"] = held_out_loss(model, test_length or length)
    return figures


def compared(figures: dict[str, float], holds: bool, least: float = 0.5) -> Outcome:
    """The outcome of a comparison of recall; none where no model learned the task."""
    best = max(value for name, value in figures.items() if name.startswith("accuracy"))
    if best < least:
        return Outcome(figures, None, "no model learned to recall in so few steps")
    return Outcome(figures, holds)
