"""Explicit multi-head attention (2026, paper 203): mixed heads at a usual and a larger rate."""

from __future__ import annotations

from torch import nn

from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import held_out_loss, speaker
from foveate.nn.decode.mea import MEA
from foveate.nn.decode.mqa import MQA

CLAIM = "after equal steps mixed heads have the lower loss, at the usual learning rate and at three"

_DIM, _HEADS, _LENGTH, _RATE = 64, 4, 64, 3e-3


def measure() -> Outcome:
    """Loss on held-out text (nats a byte) of a small language model, after 300 steps."""
    loss = {}
    for times in (1, 3):
        for name in ("full heads", "mixed heads", "mixed heads, half the cache"):
            loss[f"loss, {name}, rate ×{times}"] = _trained(name, times * _RATE)
    holds = all(
        loss[f"loss, mixed heads, rate ×{times}"] < loss[f"loss, full heads, rate ×{times}"]
        for times in (1, 3)
    )
    return Outcome(loss, holds)


def _layer(name: str) -> nn.Module:
    """An attention layer."""
    if name == "full heads":
        return MQA(_DIM, _HEADS, _HEADS, theta=10_000.0)
    components = _HEADS if name == "mixed heads" else _HEADS // 2
    return MEA(_DIM, _HEADS, components, theta=10_000.0)


def _trained(name: str, lr: float) -> float:
    """Loss on held-out text after training."""
    return held_out_loss(speaker(lambda index: _layer(name), lr=lr), _LENGTH)
