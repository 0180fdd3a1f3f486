"""Neural Attention Search (2025, paper 190): what a model that recalls learns to drop."""

from __future__ import annotations

import torch

from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import Recaller, Residual, accuracy, judged, recall
from foveate.nn.decode._kept import GLOBAL
from foveate.nn.decode.nats import Nats

CLAIM = "under pressure a model recalls as well with fewer tokens kept, and drops noise first"

# The pairs are the first tokens of a row.
_DIM, _PAIRS = 64, 8


def measure() -> Outcome:
    """Multi-query recall among noise, 64 tokens: accuracy and tokens kept at the end of a row."""
    figures: dict[str, float] = {}
    for name, pressure in (("none", 0.0), ("some", 1e-3)):
        accuracy, pairs, noise, kept = _trained(pressure)
        figures[f"accuracy, pressure {name}"] = accuracy
        figures[f"share of tokens kept, pressure {name}"] = kept
        figures[f"share of Global among pairs, pressure {name}"] = pairs
        figures[f"share of Global among noise, pressure {name}"] = noise
    free, pressed = (figures[f"share of tokens kept, pressure {x}"] for x in ("none", "some"))
    loses = figures["accuracy, pressure none"] - figures["accuracy, pressure some"]
    first = (
        figures["share of Global among pairs, pressure some"]
        > figures["share of Global among noise, pressure some"]
    )
    holds = pressed < free and loses < 0.05 and first
    return judged(figures, holds, figures["accuracy, pressure none"])


def _trained(pressure: float) -> tuple[float, float, float, float]:
    """Accuracy, shares of Global tokens among pairs and noise, share of tokens kept."""

    def make() -> Recaller:
        layers = (Nats(_DIM, 2, window=4, pressure=pressure, theta=10_000.0) for _ in range(2))
        return Recaller([Residual(layer, _DIM) for layer in layers], _DIM)

    model, seen = recall(make, filler=True), []
    layers = [part for part in model.modules() if isinstance(part, Nats)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, given: seen.append((layer, given[0])))
    right = accuracy(model, filler=True)
    with torch.no_grad():
        ends = [layer(x, return_state=True)[1] for layer, x in tuple(seen)]
        kept = torch.stack([end.kept.double().mean() / end.pos for end in ends]).mean()
        types = [layer.types(x)[..., GLOBAL].double().mean((0, 1)) for layer, x in seen[:2]]
    stays = torch.stack(types).mean(0)
    return right, float(stays[:_PAIRS].mean()), float(stays[_PAIRS:].mean()), float(kept)
