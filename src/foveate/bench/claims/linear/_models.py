"""What claims of sequence layers share: recall by layer, and small language models of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import held_out_loss, trained_on_bytes
from foveate.bench.recall.learn import Recall, learn
from foveate.nn import Transformer
from foveate.tasks.batch import Batch
from foveate.tasks.mqar import mqar
from foveate.tasks.train import fit


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


def recalled_at_once(
    patterns: Mapping[str, str],
    rows: Callable[[int, int], Batch],
    *,
    vocabulary: int = 64,
    width: int = 32,
    steps: int = 300,
    lr: float = 1e-2,
) -> dict[str, float]:
    """Accuracy by name of models of one layer behind a causal convolution, trained alike.

    rows(count, seed) makes rows of a task; each step is of 32 fresh ones, the test of 300. With
    small embeddings to start from, and nothing but pairs and questions in a row, this is learned
    in a few hundred steps.
    """
    figures = {}
    for name, pattern in patterns.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Transformer(
                vocabulary, width, pattern, layers=1, heads=1, mlp=0, conv=3, theta=None, tie=False
            )
            for table in (model.embed, model.head):
                nn.init.normal_(table.weight, std=0.02)
            fit(model.parameters(), _loss_of(model, rows), steps=steps, lr=lr)
        test = rows(300, 1_000_000)
        with torch.no_grad():
            figures[f"accuracy, {name}"] = test.accuracy(model(test.inputs))
    return figures


def pairs_and_questions(pairs: int, vocabulary: int = 64) -> Callable[[int, int], Batch]:
    """Rows (count, seed) of so many pairs and as many questions in any order, nothing else."""

    def rows(count: int, seed: int) -> Batch:
        return mqar(
            count,
            seed=seed,
            length=4 * pairs,
            pairs=pairs,
            vocabulary=vocabulary,
            spread=1.0,
            filler=False,
        )

    return rows


def _loss_of(model: Transformer, rows: Callable[[int, int], Batch]) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        batch = rows(32, step)
        return batch.loss(model(batch.inputs))

    return loss
