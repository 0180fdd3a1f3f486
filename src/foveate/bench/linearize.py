"""Layers of a trained model made linear: they learn its attention, then what it predicts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attention._trained import Told
from foveate.bench.runs import window_perplexity
from foveate.bench.train import Training, adapt, shape_of
from foveate.hf.convert import Conversion
from foveate.hf.parts import body
from foveate.hf.watch import Seen, watch
from foveate.nn.linear.hedgehog import attention_transfer_loss
from foveate.tasks.train import fit

Heads = tuple[Tensor, Tensor]
"""Queries and keys of one layer as it attends to them, rotated."""


@dataclass(frozen=True)
class Linearized:
    """Trained layers, and how well they do on held-out text.

    divergence: of each layer its KL(softmax ‖ linear) in nats, before and after it learned the
    model's attention; perplexity by stage: that of the model, then with converted layers
    "untrained", after "attention transfer" and, where there was one, after "fine-tuning".
    """

    training: Training
    divergence: dict[int, tuple[float, float]]
    perplexity: dict[str, float]

    def write(self, path: Path) -> None:
        """Keep the layers in a safetensors file; OSError when it cannot be written."""
        self.training.write(path)


def layers_of(text: str) -> tuple[int, ...] | None:
    """Layers as they are typed, "3,8-11", or None for "all"; ValueError for anything else."""
    if text == "all":
        return None
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise ValueError(f"{part!r} is no layer; give some like 3,8-11, or all")
        found |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return tuple(sorted(found))


def check_linear(conversion: Conversion) -> None:
    """Refuse layers that have no feature maps; TypeError."""
    if not hasattr(conversion.layer, "features"):
        raise TypeError(f"{conversion.card.name} has no feature maps that could learn attention")


def linearize(
    model: Any,
    conversion: Conversion,
    seen: Tensor,
    held_out: Tensor,
    *,
    steps: int = 200,
    lr: float = 1e-2,
    tune_steps: int = 100,
    tune_lr: float = 1e-3,
    progress: Told | None = None,
) -> Linearized:
    """Convert layers of a model, which is put back, and train them in two stages.

    First the feature maps of each layer learn the weights with which the model itself attends, in
    `steps` on one window of `seen` (windows, tokens) each; then, in `tune_steps`, all weights of
    the layers learn that the model predicts what it predicted before. `held_out` (windows, tokens)
    is what figures are measured on. A window's weights are held as a whole: 512 tokens are plenty.
    progress(stage, done, total) hears how far it is. Raises TypeError for layers without feature
    maps, ValueError for windows without a second token.
    """
    check_linear(conversion)
    for name, ids in (("seen", seen), ("held_out", held_out)):
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ValueError(f"{name} must be (windows, tokens >= 2), got {tuple(ids.shape)}")
    tell = progress or (lambda stage, done, total: None)
    shape = shape_of(model, seen[:1, :2])
    with conversion.apply(model) as converted:
        layers = converted.layers
        figures = {"untrained": window_perplexity(model, held_out)}
    figures = {"model": window_perplexity(model, held_out)} | figures
    watched = [attending(model, [int(i) for i in layers], ids, tell) for ids in (seen, held_out)]
    divergence = {}
    for name, layer in layers.items():
        mine, test = (notes[int(name)] for notes in watched)
        before = divergence_of(layer, test)
        transfer(layer, mine, steps=steps, lr=lr, tell=tell, name=f"layer {name}")
        divergence[int(name)] = before, divergence_of(layer, test)
    figures["attention transfer"] = _with(model, conversion, layers, held_out)
    losses: list[float] = []
    if tune_steps:
        layers, losses = adapt(
            model, conversion, seen, steps=tune_steps, lr=tune_lr, tell=tell,
            start=layers.state_dict(),
        )  # fmt: skip
        figures["fine-tuning"] = _with(model, conversion, layers, held_out)
    return Linearized(Training(conversion, layers, shape, losses), divergence, figures)


def transfer(
    layer: Any, windows: Sequence[Heads], *, steps: int, lr: float, tell: Told, name: str = "layer"
) -> list[float]:
    """Train the feature maps of a layer to attend as softmax does; the loss of every step.

    windows are queries (1, Hq, L, D) and keys (1, Hkv, L, D), one window for a step, in turn.
    """

    def loss(step: int) -> Tensor:
        q, k = windows[step % len(windows)]
        return attention_transfer_loss(q, k, *layer.features(q, k))

    # Of the layer's weights only those of the maps get a gradient, and move.
    return fit(
        layer.parameters(),
        loss,
        steps=steps,
        lr=lr,
        weight_decay=0.0,
        seen=lambda step, value: tell(f"{name}: divergence {value:.3g}", step + 1, steps),
    )


@torch.no_grad()
def divergence_of(layer: Any, windows: Sequence[Heads]) -> float:
    """KL(softmax ‖ linear) of a layer, in nats, the mean over windows."""
    found = [attention_transfer_loss(q, k, *layer.features(q, k)) for q, k in windows]
    return float(torch.stack(found).mean())


@torch.no_grad()
def attending(
    model: Any, layers: Sequence[int], ids: Tensor, tell: Told | None = None
) -> dict[int, list[Heads]]:
    """Queries and keys of some layers in the windows ids (windows, tokens), by layer."""
    held: dict[int, list[Heads]] = {layer: [] for layer in layers}

    def attention(seen: Seen) -> None:
        if seen.layer in held:
            held[seen.layer].append((seen.q.clone(), seen.k.clone()))

    with watch(model, attention=attention):
        for i, row in enumerate(ids):
            body(model)(row[None], use_cache=False)
            if tell:
                tell("watching the model", i + 1, len(ids))
    return held


def _with(model: Any, conversion: Conversion, layers: nn.ModuleDict, windows: Tensor) -> float:
    """The perplexity with layers that have learned."""
    with conversion.apply(model) as converted:
        converted.layers.load_state_dict(layers.state_dict())
        return window_perplexity(model, windows)
