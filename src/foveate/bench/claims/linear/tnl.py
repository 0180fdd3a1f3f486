"""TransNormerLLM (2024, paper 37): a language model of lightning attention beside softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import held_out_loss, trained_on_bytes
from foveate.bench.timing import paired
from foveate.nn import Transformer
from foveate.nn.linear.tnl import TransNormer

CLAIM = "it models text as well as softmax attention of its size, at a speed constant in length"

_DIM, _HEADS, _LAYERS = 64, 4, 2
_SHORT, _LONG = 1024, 8192


class _Speaker(nn.Module):
    """A TransNormer between an embedding and a head of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, _DIM), nn.Linear(_DIM, 256, bias=False)
        self.stack = TransNormer(_DIM, _HEADS, _LAYERS)
        for table in (self.embed, self.head):
            nn.init.normal_(table.weight, std=_DIM**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, L, 256) of ids (B, L)."""
        logits: Tensor = self.head(self.stack(self.embed(ids)))
        return logits


def measure() -> Outcome:
    """Loss of both after 200 steps of 8 rows of 128 bytes, and time at 1,024 and 8,192 tokens."""
    models: dict[str, Any] = {}
    for name, make in (("tnl", _Speaker), ("softmax", _softmax)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            models[name] = make()
        trained_on_bytes(models[name], length=128, steps=200)
    figures = {f"loss, {name}": held_out_loss(model, 128) for name, model in models.items()}
    for name, model in models.items():
        figures[f"time of 8,192 / 1,024 tokens, {name}"] = _slope(model)
    loss, softmax, slope, _ = figures.values()
    return Outcome(figures, loss < 1.05 * softmax and slope < 1.25 * _LONG / _SHORT)


def _softmax() -> nn.Module:
    return Transformer(256, _DIM, "dense", layers=_LAYERS, heads=_HEADS, tie=False)


@torch.inference_mode()
def _slope(model: nn.Module) -> float:
    """Time of a long row over that of a short one."""
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (1, _LONG), generator=made)
    return paired(lambda: model(ids), lambda: model(ids[:, :_SHORT]), 5)[2]
