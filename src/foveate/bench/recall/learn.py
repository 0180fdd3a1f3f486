"""One small model that learns to recall, and how well it does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.nn import Transformer
from foveate.nn._recurrent import state_bytes
from foveate.tasks.batch import Batch, check_at_least
from foveate.tasks.mqar import mqar
from foveate.tasks.train import fit

# Seeds of test rows start here, far from those of the training steps.
_TEST = 1_000_000


@dataclass(frozen=True)
class Recall:
    """The task and the training: two layers without MLPs, `pairs` pairs within `length` tokens.

    Between the questions are blanks, or random tokens with `filler`, which takes longer to learn.
    Every step is on a fresh batch of rows. `conv` is the width of the causal convolution before
    each layer, without which only attention can put a key beside its value.
    """

    pairs: int = 4
    length: int = 32
    vocabulary: int = 64
    filler: bool = False
    width: int = 32
    heads: int = 1
    layers: int = 2
    conv: int = 3
    steps: int = 400
    batch: int = 32
    lr: float = 2e-2
    test_rows: int = 1000

    def __post_init__(self) -> None:
        names = ("width", "heads", "layers", "steps", "batch", "test_rows")
        check_at_least(1, **{name: getattr(self, name) for name in names})
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


@dataclass(frozen=True)
class Learned:
    """A trained model, its accuracy on fresh rows, what it holds, and how long it took to train."""

    model: Transformer
    accuracy: float
    parameters: int
    state_bytes: int
    seconds: float


def learn(
    pattern: str,
    task: Recall | None = None,
    *,
    seed: int = 0,
    seen: Callable[[int, float], None] | None = None,
) -> Learned:
    """Train layers after a pattern to recall; the state is that after the whole row.

    Raises ValueError for an unknown layer and for sizes that do not fit.
    """
    task = task or Recall()
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model(pattern, task)

        def loss(step: int) -> Tensor:
            rows = _rows(task, task.batch, seed * task.steps + step)
            return rows.loss(model(rows.inputs))

        fit(model.parameters(), loss, steps=task.steps, lr=task.lr, seen=seen)
    seconds = time.perf_counter() - start
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    return Learned(model, accuracy(model, task), parameters, _held(model, task), seconds)


def state_of(pattern: str, task: Recall) -> int:
    """Bytes that a model keeps while decoding a row, without training it; raises as `learn`."""
    with torch.random.fork_rng():
        return _held(_model(pattern, task).eval(), task)


def _model(pattern: str, task: Recall) -> Transformer:
    """Layers after a pattern without MLPs and without positions, untrained."""
    return Transformer(
        task.vocabulary,
        task.width,
        pattern,
        layers=task.layers,
        heads=task.heads,
        mlp=0,
        conv=task.conv,
        theta=None,
        tie=False,
    )


@torch.no_grad()
def accuracy(model: Transformer, task: Recall) -> float:
    """Share of right answers on rows that were not trained on."""
    test = _rows(task, task.test_rows, _TEST)
    logits = torch.cat([model(part) for part in test.inputs.split(200)])
    return test.accuracy(logits)


@torch.no_grad()
def _held(model: Transformer, task: Recall) -> int:
    """Bytes of the state after one row."""
    _, state = model(_rows(task, 1, _TEST).inputs, return_state=True)
    return state_bytes(state)


def _rows(task: Recall, count: int, seed: int) -> Batch:
    return mqar(
        count,
        seed=seed,
        length=task.length,
        pairs=task.pairs,
        vocabulary=task.vocabulary,
        filler=task.filler,
    )
