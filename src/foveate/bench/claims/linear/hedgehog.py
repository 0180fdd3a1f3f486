"""Hedgehog (2024, paper 45): feature maps that learn a trained model's own attention."""

from __future__ import annotations

from dataclasses import replace

import torch

from foveate import ops
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.linearize import Heads, attending, linearize
from foveate.hf.convert import Conversion
from foveate.nn.linear.hedgehog import attention_transfer_loss

CLAIM = (
    "maps that learn softmax's weights come nearer to it than fixed ones, and to the model's words"
)

_LAYERS, _LENGTH, _SEEN, _HELD_OUT = (4, 12, 20, 28), 256, 8, 6


def measure() -> Outcome:
    """Four of 30 layers made linear, their maps taught in 100 steps on 8 windows of 256 tokens.

    Divergence from softmax, in nats, the mean over layers, and perplexity, both on 6 other windows.
    """
    model, _ = loaded()
    count = _SEEN + _HELD_OUT
    seen, test = text_ids(count * _LENGTH).view(count, _LENGTH).split((_SEEN, _HELD_OUT))
    conversion = replace(Conversion.of("hedgehog"), layers=_LAYERS)
    found = linearize(model, conversion, seen, test, steps=100, tune_steps=0)
    notes = attending(model, _LAYERS, test)
    untrained, trained = (
        sum(kl) / len(_LAYERS) for kl in zip(*found.divergence.values(), strict=True)
    )
    figures = {"KL, untrained": untrained, "KL, trained": trained}
    for name in ("elu1", "taylor2"):
        figures[f"KL, {name}"] = sum(_fixed(name, notes[n]) for n in _LAYERS) / len(_LAYERS)
    figures |= {f"perplexity, {stage}": value for stage, value in found.perplexity.items()}
    best = min(figures["KL, elu1"], figures["KL, taylor2"], untrained)
    better = figures["perplexity, attention transfer"] < figures["perplexity, untrained"]
    return Outcome(figures, trained < best and better)


@torch.no_grad()
def _fixed(name: str, windows: list[Heads]) -> float:
    """Divergence of a feature map that learns nothing."""
    phi = ops.feature_map(name)
    found = [attention_transfer_loss(q, k, phi(q), phi(k)) for q, k in windows]
    return float(torch.stack(found).mean())
