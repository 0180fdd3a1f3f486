"""SeqBoat (2023, paper 299): how much attention a layer asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import held_out_loss, trained_on_bytes
from foveate.nn import Transformer
from foveate.nn.linear.seqboat import SeqBoat

CLAIM = "a layer that chooses which tokens attend needs fewer than half and speaks as well as all"

_PATTERN = "seqboat:width=16,states=8,window=32,expand=1"
_LENGTH, _STEPS = 64, 150
# Biases of the logit that activates a token: never, as it learns, always.
_WAYS = {"no token": -100.0, "those it chooses": None, "every token": 100.0}


def measure() -> Outcome:
    """Nats a byte of two layers of 32 channels whose tokens attend never, by choice, or always."""
    figures = {}
    for name, bias in _WAYS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Transformer(256, 32, _PATTERN, layers=2, tie=False)
        layers = [part for part in model.modules() if isinstance(part, SeqBoat)]
        if bias is not None:
            for layer in layers:
                torch.nn.init.zeros_(layer.route.weight)
                layer.route.bias.data = torch.tensor([0.0, bias])
        trained_on_bytes(model, length=_LENGTH, steps=_STEPS)
        counts = _Counts(layers)
        figures[f"loss, {name}"] = held_out_loss(model, _LENGTH)
        figures[f"activated, {name}"] = counts.active / counts.tokens
    near = figures["loss, those it chooses"] < figures["loss, every token"] + 0.02
    return Outcome(figures, near and figures["activated, those it chooses"] < 0.5)


class _Counts:
    """Tokens that pass layers from now on, and how many of them are activated."""

    def __init__(self, layers: list[SeqBoat]) -> None:
        self.tokens = self.active = 0
        for layer in layers:
            layer.route.register_forward_hook(self._count)

    def _count(self, module: Any, given: Any, logits: Tensor) -> None:
        self.tokens += logits[..., 0].numel()
        self.active += int((logits.argmax(-1) == 1).sum())
