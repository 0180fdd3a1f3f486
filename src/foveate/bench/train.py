"""Training the learned part of a mechanism, or a layer, on a model that stays frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from foveate.attention._trained import (
    InTraining,
    Learner,
    ModelShape,
    Told,
    Trainable,
    read_trained,
    write_trained,
)
from foveate.attention.base import Attention, Call, Result, dense_result
from foveate.hf.attach import attach
from foveate.hf.convert import Conversion, Converted
from foveate.hf.parts import body, head_logits
from foveate.registry import Card, create, find, lookup, parse
from foveate.tasks.train import fit

# Tokens on which a learner tries things out when its steps are done.
_PROBE = 256


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


def named(spec: str) -> Any:
    """What a string names to be trained: a mechanism, or the conversion of a model's layers."""
    return Conversion.of(spec) if _converts(parse(spec)[0]) else create(spec)


def train(
    model: Any,
    mechanism: Any,
    texts: Sequence[Tensor],
    *,
    steps: int = 200,
    lr: float = 1e-3,
    progress: Told | None = None,
) -> Training:
    """Train a mechanism's learned part on texts of one task each, (windows, tokens) of token ids.

    The steps go through the tasks in turn, and through the windows of each. The model's weights
    are left as they are. progress(stage, done, total) hears how far it is. A layer that stands for
    several of a model (it has a `depth`) learns to give what those in its middle give, as
    `teach` says, and the layers of a `Conversion` learn as `adapt` says. Raises TypeError for a
    mechanism that learns nothing, ValueError for texts without a second token and for too few
    steps: only what calibrates itself is of use after none.
    """
    check_trainable(mechanism, steps)
    for ids in texts:
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ValueError(f"texts must be (windows, tokens >= 2) each, got {tuple(ids.shape)}")
    tell = progress or (lambda stage, done, total: None)
    shape = shape_of(model, texts[0][:1, :2])
    if isinstance(mechanism, nn.Module):
        losses = teach(model, mechanism, torch.cat(list(texts)), steps=steps, lr=lr, tell=tell)
        return Training(mechanism, mechanism, shape, losses)
    if isinstance(mechanism, Conversion):
        layers, losses = adapt(
            model, mechanism, torch.cat(list(texts)), steps=steps, lr=lr, tell=tell
        )
        return Training(mechanism, layers, shape, losses)
    learner = mechanism.learner(shape)
    dense = getattr(mechanism, "dense_layers", ())
    place = InTraining(learner=learner, dense_layers=dense)
    windows = [(task, row[None]) for task, ids in enumerate(texts) for row in ids]

    known: list[Tensor] = []

    def loss(step: int) -> Tensor:
        """Of one step: through the model, or from the notes."""
        task, text = step % len(texts), None
        if learner.through_model:
            own = [i for i, (t, _) in enumerate(windows) if t == task]
            at = own[step // len(texts) % len(own)]
            own_states = known[at] if learner.distil else None
            text = text_loss(model, windows[at][1], own_states, learner.distil)
        return learner.loss(step / steps, text, task)

    with _frozen(model), attach(model, prefill=place):
        if not learner.through_model or mechanism.calibrates:
            for i, (_, ids) in enumerate(windows):
                states = _last_states(model, ids)
                known += [states] if learner.distil else []
                tell("watching the model", i + 1, len(windows))
            learner.watched()
        losses = _fitted(learner.parameters(), loss, steps, lr, tell) if steps else []
        learner.finish(lambda: _last_states(model, windows[0][1][:, :_PROBE]), tell)
    return Training(mechanism, learner, shape, losses)


@torch.no_grad()
def _last_states(model: Any, ids: Tensor) -> Tensor:
    """The model's last hidden states (B, T, width)."""
    states: Tensor = body(model)(ids, use_cache=False).last_hidden_state
    return states


def _fitted(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    steps: int,
    lr: float,
    tell: Told,
) -> list[float]:
    """Losses of the steps that minimise a loss, told as they come."""
    return fit(
        parameters,
        loss,
        steps=steps,
        lr=lr,
        weight_decay=0.0,
        seen=lambda step, value: tell(f"training, loss {value:.3g}", step + 1, steps),
    )


def teach(model: Any, layer: Any, ids: Tensor, *, steps: int, lr: float, tell: Told) -> list[float]:
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

    return _fitted(layer.parameters(), loss, steps, lr, tell)


def adapt(
    model: Any,
    conversion: Conversion,
    ids: Tensor,
    *,
    steps: int,
    lr: float,
    tell: Told,
    start: Mapping[str, Tensor] | None = None,
) -> tuple[nn.ModuleDict, list[float]]:
    """Convert a model and train the new layers to predict what it predicted; put it back.

    ids are (windows, tokens), `start` the weights of the layers before the first step, None for
    those that the conversion gives them. Returns the layers and the loss of every step, the KL
    divergence from the model's own predictions in nats.
    """
    known = []
    for i, row in enumerate(ids):
        known.append(_last_states(model, row[None]))
        tell("watching the model", i + 1, len(ids))
    with _frozen(model), conversion.apply(model) as converted:
        if start is not None:
            converted.layers.load_state_dict(start)

        def loss(step: int) -> Tensor:
            at = step % len(ids)
            return text_loss(model, ids[at : at + 1], known[at], 1.0)

        losses = _fitted(converted.layers.parameters(), loss, steps, lr, tell)
    return converted.layers, losses


def load_conversion(model: Any, path: Path | str, mechanism: str) -> Converted:
    """Convert a model, or some of its layers, to those that were trained for it.

    The result is a context manager; call `undo` instead to put the model back. Raises
    ValueError for the file of another mechanism or model.
    """
    held = read_trained(str(path), mechanism)
    held.check_model(shape_of(model, torch.zeros(1, 2, dtype=torch.long)))
    layers = {name.partition(".")[0] for name in held.weights}
    try:
        at = tuple(sorted(map(int, layers)))
        converted = Conversion(lookup(mechanism), held.options, at).apply(model)
    except ValueError as error:
        raise ValueError(f"{path} holds no {mechanism} for this model: {error}") from error
    try:
        converted.layers.load_state_dict(held.weights)
    except RuntimeError as error:
        converted.undo()
        raise ValueError(f"{path} holds no {mechanism} for this model: {error}") from error
    return converted


def load_layer(path: Path | str, mechanism: str) -> nn.Module:
    """A layer that was taught, as its file holds it; ValueError when it holds another."""
    held = read_trained(str(path), mechanism)
    layer: nn.Module = create(mechanism, **held.options)
    try:
        layer.load_state_dict(held.weights)
    except RuntimeError as error:
        raise ValueError(f"{path} holds no {mechanism}: {error}") from error
    return layer


def check_trainable(mechanism: Any, steps: int) -> None:
    """Refuse a mechanism that learns nothing, or nothing in so few steps."""
    if not isinstance(mechanism, Conversion) and not _learns(type(mechanism)):
        known = [c.name for c in find() if _learns(cls := lookup(c.name)) or _converts(cls)]
        name = getattr(getattr(mechanism, "card", None), "name", repr(mechanism))
        raise TypeError(f"{name} has nothing to train; known: {', '.join(known)}")
    least = 0 if getattr(mechanism, "calibrates", False) else 1
    if steps < least:
        raise ValueError(f"{mechanism.card.name} needs at least {least} steps, got {steps}")


def _learns(cls: Any) -> bool:
    """Whether a class of mechanisms has a trained part, or is a layer that can be taught."""
    return issubclass(cls, Trainable) or hasattr(cls, "depth")


def _converts(cls: Any) -> bool:
    """Whether a class of layers is made from those of a model."""
    return hasattr(cls, "converted")


def text_loss(model: Any, ids: Tensor, known: Tensor | None = None, distil: float = 0.0) -> Tensor:
    """The model's mean loss on the next tokens of ids (B, T).

    The share `distil` of it is the KL divergence from what the model itself predicts, whose last
    hidden states are `known` (B, T, width).
    """
    hidden = body(model)(ids[:, :-1], use_cache=False).last_hidden_state
    logits = head_logits(model, hidden.flatten(0, 1))
    loss = cross_entropy(logits, ids[:, 1:].flatten())
    if known is None:
        return loss
    wanted = log_softmax(head_logits(model, known[:, :-1].flatten(0, 1)), -1)
    away = kl_div(log_softmax(logits, -1), wanted, log_target=True, reduction="batchmean")
    return (1 - distil) * loss + distil * away


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
