"""HGRN (2023): memory that lasts longer in upper layers, and what a vector cannot recall."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import trained_on_bytes
from foveate.bench.claims.linear._models import pairs_and_questions, recalled_at_once
from foveate.hf.text import builtin_text
from foveate.nn import Transformer

CLAIM = "upper layers forget more slowly, and a vector as state is too small to recall pairs"


def measure() -> Outcome:
    """What the gates of four trained layers keep, and recall beside a matrix as state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(256, 64, "hgrn", layers=4, tie=False)
    trained_on_bytes(model, length=96, steps=150)
    kept = _kept(model)
    figures = {f"mean gate, layer {i}": gate for i, gate in enumerate(kept)}
    layers = {name: f"{name}:index=3,layers=4" for name in ("hgrn", "hgrn2")}
    figures |= recalled_at_once(layers, pairs_and_questions(8))
    slower = kept[0] < min(kept[1:])
    weaker = figures["accuracy, hgrn"] < figures["accuracy, hgrn2"]
    return Outcome(figures, slower and weaker)


@torch.no_grad()
def _kept(model: Transformer) -> list[float]:
    """Mean forget gate of each layer on 768 bytes of text."""
    seen: list[float] = []

    def note(bound: Any, args: Any, log_gate: Tensor) -> None:
        seen.append(float(log_gate.exp().mean()))

    blocks: Any = model.stack.blocks
    for block in blocks:
        block.layer.bound.register_forward_hook(note)
    model(torch.tensor(list(builtin_text().encode()[:768])).view(8, 96))
    return seen
