"""Mechanisms with trained parts: what a trainer needs of them, and the files they are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from foveate.attention.base import Attention, Call, Result
from foveate.files import read_tensors, write_tensors
from foveate.registry import Card

FORMAT = "foveate.trained/1"

Told = Callable[[str, int, int], None]
"""Hears the stage of a training, and how much of it is done."""


class ModelShape(NamedTuple):
    """Sizes of a model's attention, the same in all its layers."""

    layers: int
    q_heads: int
    kv_heads: int
    dim: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, call: Call) -> ModelShape:
        """Those of the model behind a call."""
        return cls(call.layers, q.shape[1], k.shape[1], q.shape[3])


class Learner(nn.Module):
    """What a mechanism learns on one model, and how; the model itself stays frozen.

    While it is trained it attends in the mechanism's place and takes note of what `loss` needs.
    A learner that goes `through_model` is trained by the model's own loss: every step is a pass,
    and gradients flow back through it. Any other learns from its notes alone: it watches every
    text once, without gradients, and each step draws from what it noted. `distil` is the share
    of the model's loss that is the divergence from its own predictions; a learner with any attends
    densely while it watches.
    """

    through_model: ClassVar[bool] = False
    distil: ClassVar[float] = 0.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """A layer's output while training."""
        raise NotImplementedError

    def watched(self) -> None:
        """Make something of the notes; called when all texts were watched."""

    def loss(self, done: float, text: Tensor | None, task: int) -> Tensor:
        """What to minimise when the share `done` of the steps is done.

        text is the model's loss in the pass of this step, on the text of number `task`; None for
        a learner that only watches.
        """
        raise NotImplementedError

    def finish(self, hidden: Callable[[], Tensor], told: Told) -> None:
        """End the training; `hidden` runs the model and gives the last hidden states of a text."""

    def weights(self) -> dict[str, Tensor]:
        """What is kept of it in a file."""
        return dict(self.state_dict())


class Trainable:
    """A mechanism with a trained part, kept in the file its option `trained` names ("": none).

    One that `calibrates` watches the texts before its first step, and is of use without any.
    """

    calibrates: ClassVar[bool] = False

    trained: ClassVar[str]
    """Name of that option."""

    card: ClassVar[Card]

    def learner(self, shape: ModelShape) -> Learner:
        """The part as it is before training; its `weights` are what the file holds."""
        raise NotImplementedError

    def read(self) -> Trained | None:
        """What the file holds, None without one; ValueError when it is not of this mechanism."""
        path = getattr(self, self.trained)
        return read_trained(path, self.card.name) if path else None


@dataclass(frozen=True, kw_only=True, eq=False)
class InTraining(Attention):
    """A learner in the place of the mechanism it trains."""

    card = Card(
        name="in_training",
        title="A mechanism in training",
        claim="its learner attends",
        kind="attention",
        family="dense",
        phases=("prefill",),
    )

    learner: Learner

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Whatever the learner gives."""
        return Result(self.learner.attend(q, k, v, call))


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained part: its tensors, the model it was trained on, the options it was trained with."""

    path: str
    mechanism: str
    shape: ModelShape
    options: dict[str, Any]
    weights: dict[str, Tensor]

    def check_options(self, **mine: Any) -> None:
        """Refuse options that differ from those of the training."""
        for key, value in mine.items():
            if self.options.get(key) != value:
                raise ValueError(
                    f"{self.path} was trained with {key}={self.options.get(key)}, "
                    f"but {self.mechanism} has {key}={value}: they must agree"
                )

    def check_tensors(self, what: str, **want: tuple[int, ...]) -> None:
        """Refuse a file whose tensors do not have these names and shapes."""
        got = {name: tuple(x.shape) for name, x in self.weights.items()}
        if got != want:
            raise ValueError(f"{self.path} holds no {what} for its model: wanted {want}, got {got}")

    def check_model(self, found: ModelShape) -> None:
        """Refuse a model of another shape."""
        if found != self.shape:
            raise ValueError(
                f"{self.path} was trained on a model with {_words(self.shape)}, "
                f"but this one has {_words(found)}"
            )


def _words(shape: ModelShape) -> str:
    return (
        f"{shape.layers} layers, {shape.q_heads} query heads, {shape.kv_heads} kv heads "
        f"of {shape.dim}"
    )


def write_trained(
    path: Path, mechanism: Any, shape: ModelShape, weights: Mapping[str, Tensor]
) -> None:
    """Write the trained part of a mechanism, whole or not at all; OSError when that fails.

    A mechanism with a dict `options` names them there, any other is a dataclass.
    """
    options = mechanism.options if hasattr(mechanism, "options") else asdict(mechanism)
    about = {
        "format": FORMAT,
        "mechanism": mechanism.card.name,
        "shape": json.dumps(shape._asdict()),
        "options": json.dumps(options),
    }
    write_tensors(path, weights, about)


def read_trained(path: str, mechanism: str) -> Trained:
    """The trained part in a file, read once; ValueError when it is none of this mechanism."""
    try:
        found_file = Path(path).stat()
    except OSError as error:
        raise ValueError(f"{mechanism}: cannot read {path}: {error.strerror}") from error
    # Two files written one after the other may bear the same time, but are not the same node.
    found = _read(path, (found_file.st_mtime_ns, found_file.st_ino))
    if found.mechanism != mechanism:
        raise ValueError(f"{path} was trained for {found.mechanism}, not for {mechanism}")
    return found


@lru_cache(maxsize=8)
def _read(path: str, stamp: tuple[int, int]) -> Trained:
    """A file, as the one that `stamp` tells from others of its name."""
    weights, about = read_tensors(Path(path))
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by `foveate train`: its format is "
            f"{about.get('format')!r}, wanted {FORMAT!r}"
        )
    try:
        shape, options = ModelShape(**json.loads(about["shape"])), json.loads(about["options"])
        return Trained(path, about["mechanism"], shape, options, weights)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has damaged metadata: {error!r}") from error
