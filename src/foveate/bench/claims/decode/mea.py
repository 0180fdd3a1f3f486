"""Explicit multi-head attention (2026, paper 203): mixed heads at a usual and a larger rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import Residual
from foveate.hf.text import builtin_text
from foveate.nn.decode.mea import MEA
from foveate.nn.decode.mqa import MQA
from foveate.tasks.train import fit

CLAIM = "after equal steps mixed heads have the lower loss, at the usual learning rate and at three"

_DIM, _HEADS, _LAYERS, _LENGTH, _ROWS, _STEPS, _RATE = 64, 4, 4, 64, 8, 300, 3e-3


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


def _mlp() -> nn.Module:
    """What follows it."""
    return nn.Sequential(nn.Linear(_DIM, 4 * _DIM), nn.SiLU(), nn.Linear(4 * _DIM, _DIM))


def _trained(name: str, lr: float) -> float:
    """Loss on held-out text after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(256, _DIM),
            *(Residual(part, _DIM) for _ in range(_LAYERS) for part in (_layer(name), _mlp())),
            nn.RMSNorm(_DIM),
            nn.Linear(_DIM, 256),
        )
    text = torch.frombuffer(bytearray(builtin_text().encode()), dtype=torch.uint8).long()
    held, seen = text[:65_536], text[65_536:]

    def loss(rows: Tensor) -> Tensor:
        return cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def batch(step: int) -> Tensor:
        made = torch.Generator().manual_seed(step)
        at = torch.randint(len(seen) - _LENGTH, (_ROWS, 1), generator=made)
        return loss(seen[at + torch.arange(_LENGTH + 1)])

    fit(model.parameters(), batch, steps=_STEPS, lr=lr)
    with torch.no_grad():
        parts = held[: 256 * _LENGTH].view(-1, _LENGTH).split(64)
        return float(torch.stack([loss(part) for part in parts]).mean())
