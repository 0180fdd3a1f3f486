"""Training the learned part of a mechanism, or a layer, on a model that stays frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.attention._trained import (
    InTraining,
    Learner,
    ModelShape,
    Trainable,
    read_trained,
    write_trained,
)
from foveate.attention.base import Attention, Call, Result, dense_result
from foveate.bench.runs import body, head_logits
from foveate.hf.attach import attach
from foveate.registry import Card, create, find, lookup
from foveate.tasks.train import fit

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Training:
    """What came of a training: what has learned, the model's sizes, the loss of each step."""

    mechanism: Any
    learner: Learner | nn.Module
    shape: ModelShape
    losses: list[float]

    def write(self, path: Path) -> None:
        """Keep the trained part in a safetensors file; OSError when it cannot be written."""
        learner = self.learner
        weights = learner.weights() if isinstance(learner, Learner) else learner.state_dict()
        write_trained(path, self.mechanism, self.shape, weights)


def train(
    model: Any,
    mechanism: Any,
    texts: Sequence[Tensor],
    *,
    steps: int = 200,
    lr: float = 1e-3,
    progress: Progress | None = None,
) -> Training:
    """Train a mechanism's learned part on texts of one task each, (windows, tokens) of token ids.

    The steps go through the tasks in turn, and through the windows of each. The model's weights
    are left as they are. progress(stage, done, total) hears how far it is. A layer that stands for
    several of a model (it has a `depth`) learns to give what those in its middle give, as
    `teach` says. Raises TypeError for a mechanism that learns nothing, ValueError for texts without
    a second token.
    """
    check_trainable(mechanism)
    for ids in texts:
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ValueError(f"texts must be (windows, tokens >= 2) each, got {tuple(ids.shape)}")
    tell = progress or (lambda stage, done, total: None)
    shape = shape_of(model, texts[0][:1, :2])
    if isinstance(mechanism, nn.Module):
        losses = teach(model, mechanism, torch.cat(list(texts)), steps=steps, lr=lr, tell=tell)
        return Training(mechanism, mechanism, shape, losses)
    learner = mechanism.learner(shape)
    dense = getattr(mechanism, "dense_layers", ())
    place = InTraining(learner=learner, dense_layers=dense)
    windows = [(task, row[None]) for task, ids in enumerate(texts) for row in ids]

    def loss(step: int) -> Tensor:
        """Of one step: through the model, or from the notes."""
        task, ids = step % len(texts), None
        text = None
        if learner.through_model:
            own = [x for t, x in windows if t == task]
            ids = own[step // len(texts) % len(own)]
            text = text_loss(model, ids)
        return learner.loss(step / steps, text, task)

    with _frozen(model), attach(model, prefill=place):
        if not learner.through_model:
            for i, (_, ids) in enumerate(windows):
                with torch.no_grad():
                    body(model)(ids, use_cache=False)
                tell("watching the model", i + 1, len(windows))
        losses = fit(
            learner.parameters(),
            loss,
            steps=steps,
            lr=lr,
            weight_decay=0.0,
            seen=lambda step, value: tell(f"training, loss {value:.3g}", step + 1, steps),
        )
    return Training(mechanism, learner, shape, losses)


def teach(
    model: Any, layer: Any, ids: Tensor, *, steps: int, lr: float, tell: Progress
) -> list[float]:
    """Train a layer of some `depth` to do what as many layers in the middle of a model do.

    ids are (windows, tokens). The loss is the squared distance to the hidden states that the
    model's layers give, over the squared way they go, mean over tokens: 1 is doing nothing.
    Raises ValueError when the model is too small.
    """
    config = model.config.get_text_config()
    depth, layers = layer.depth, config.num_hidden_layers
    if depth >= layers or layer.options["dim"] != config.hidden_size:
        raise ValueError(
            f"a layer of dim {layer.options['dim']} that stands for {depth} needs a model of that "
            f"width with more layers, got width {config.hidden_size} and {layers} layers"
        )
    first, pairs = (layers - depth) // 2, []
    for i, row in enumerate(ids):
        with torch.no_grad():
            states = body(model)(row[None], use_cache=False, output_hidden_states=True)
        pairs.append((states.hidden_states[first], states.hidden_states[first + depth]))
        tell("watching the model", i + 1, len(ids))

    def loss(step: int) -> Tensor:
        x, want = pairs[step % len(pairs)]
        missed, way = (layer(x) - want).square().sum(-1), (x - want).square().sum(-1)
        return (missed / way).mean()

    return fit(
        layer.parameters(),
        loss,
        steps=steps,
        lr=lr,
        weight_decay=0.0,
        seen=lambda step, value: tell(f"training, loss {value:.3g}", step + 1, steps),
    )


def load_layer(path: Path | str, mechanism: str) -> nn.Module:
    """A layer that was taught, as its file holds it; ValueError when it holds another."""
    held = read_trained(str(path), mechanism)
    layer: nn.Module = create(mechanism, **held.options)
    try:
        layer.load_state_dict(held.weights)
    except RuntimeError as error:
        raise ValueError(f"{path} holds no {mechanism}: {error}") from error
    return layer


def check_trainable(mechanism: Any) -> None:
    """Refuse a mechanism that learns nothing."""
    if not _learns(type(mechanism)):
        known = [c.name for c in find() if _learns(lookup(c.name))]
        name = getattr(getattr(mechanism, "card", None), "name", repr(mechanism))
        raise TypeError(f"{name} has nothing to train; known: {', '.join(known)}")


def _learns(cls: Any) -> bool:
    """Whether a class of mechanisms has a trained part, or is a layer that can be taught."""
    return issubclass(cls, Trainable) or hasattr(cls, "depth")


def text_loss(model: Any, ids: Tensor) -> Tensor:
    """The model's mean loss on the next tokens of ids (B, T)."""
    hidden = body(model)(ids[:, :-1], use_cache=False).last_hidden_state
    logits = head_logits(model, hidden.flatten(0, 1))
    return cross_entropy(logits, ids[:, 1:].flatten())


@torch.no_grad()
def shape_of(model: Any, ids: Tensor) -> ModelShape:
    """Sizes of a model's attention, seen in a pass over a few tokens.

    Raises ValueError when its layers differ, or none goes through the slots.
    """
    watcher = _Watcher()
    with attach(model, prefill=watcher):
        body(model)(ids, use_cache=False)
    shapes = set(watcher.seen)
    if len(shapes) != 1:
        raise ValueError(
            f"training needs a model whose layers all attend alike, found {sorted(shapes)}"
        )
    return shapes.pop()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Watcher(Attention):
    """Dense attention that takes down the sizes of every call."""

    card = Card(
        name="watcher",
        title="Sizes of a model",
        claim="dense attention that is watched",
        kind="attention",
        family="dense",
        phases=("prefill",),
    )

    seen: list[ModelShape] = field(default_factory=list)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Dense attention."""
        self.seen.append(ModelShape.of(q, k, call))
        return dense_result(q, k, v, call)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No weight of the model gets a gradient."""
    thawed = [p for p in model.parameters() if p.requires_grad]
    for p in thawed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in thawed:
            p.requires_grad_(True)
