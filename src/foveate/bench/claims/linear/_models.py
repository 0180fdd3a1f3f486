"""What claims of sequence layers share: recall by layer, and small language models of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import Recaller, held_out_loss, trained_on_bytes
from foveate.nn import Transformer
from foveate.nn._stack import Stack
from foveate.tasks.batch import Batch
from foveate.tasks.mqar import mqar
from foveate.tasks.train import fit

Rows = Callable[[int, int], Batch]
"""Makes so many rows of a task from a seed."""


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
    rows: Rows,
    *,
    vocabulary: int = 64,
    width: int = 32,
    steps: int = 300,
    lr: float = 1e-2,
) -> dict[str, float]:
    """Accuracy by name of models of one layer behind a causal convolution, trained alike.

    rows(count, seed) makes rows of a task. With small embeddings to start from, and nothing but
    pairs and questions in a row, this is learned in a few hundred steps.
    """

    def model(pattern: str) -> nn.Module:
        made = Transformer(
            vocabulary, width, pattern, layers=1, heads=1, mlp=0, conv=3, theta=None, tie=False
        )
        for table in (made.embed, made.head):
            nn.init.normal_(table.weight, std=0.02)
        return made

    return _accuracies(patterns, model, rows, steps, lr)


def soon_recalled(
    patterns: Mapping[str, str],
    *,
    layers: int | None = None,
    length: int = 32,
    dim: int = 32,
    heads: int = 2,
    steps: int = 300,
    lr: float = 1e-2,
) -> dict[str, float]:
    """Accuracy by name of stacks after a pattern, repeated up to `layers`, trained alike.

    A row is four pairs, then questions with blanks between them.
    """

    def model(pattern: str) -> nn.Module:
        return Recaller([Stack(dim, pattern, layers=layers, heads=heads)], dim, 64)

    return _accuracies(patterns, model, pairs_and_questions(4, length=length), steps, lr)


def pairs_and_questions(pairs: int, vocabulary: int = 64, length: int | None = None) -> Rows:
    """Rows (count, seed) of so many pairs and as many questions, blanks if `length` has room."""

    def rows(count: int, seed: int) -> Batch:
        return mqar(
            count,
            seed=seed,
            length=4 * pairs if length is None else length,
            pairs=pairs,
            vocabulary=vocabulary,
            spread=1.0,
            filler=False,
        )

    return rows


def _accuracies(
    patterns: Mapping[str, str],
    make: Callable[[str], nn.Module],
    rows: Rows,
    steps: int,
    lr: float,
) -> dict[str, float]:
    """Accuracy on 300 rows of models made from the same random numbers, 32 fresh rows a step."""
    figures = {}
    test = rows(300, 1_000_000)
    for name, pattern in patterns.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make(pattern)
            fit(model.parameters(), _loss_of(model, rows), steps=steps, lr=lr)
        with torch.no_grad():
            figures[f"accuracy, {name}"] = test.accuracy(model(test.inputs))
    return figures


def _loss_of(model: nn.Module, rows: Rows) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        batch = rows(32, step)
        return batch.loss(model(batch.inputs))

    return loss
