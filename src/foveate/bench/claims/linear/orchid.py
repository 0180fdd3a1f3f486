"""Orchid (2024, paper 2): what a kernel made from the sequence is good for."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate import create
from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import compared
from foveate.bench.timing import paired
from foveate.nn import Transformer
from foveate.tasks.batch import Batch
from foveate.tasks.train import fit

CLAIM = "a kernel that depends on the sequence recalls better than a fixed one, in near-linear time"

_LONG, _SHORT = 4096, 1024
# Distinct keys, and distinct values; pairs of a row.
_KEYS, _PAIRS = 8, 8


def measure() -> Outcome:
    """The value of a key after 8 pairs, both sides seen; time of 4,096 tokens over 1,024."""
    kinds = {"adaptive kernel": "power", "fixed kernel": "none"}
    figures = {f"accuracy, {name}": _accuracy(kind) for name, kind in kinds.items()}
    adaptive, fixed = figures.values()
    with torch.inference_mode():
        layer = create("orchid", dim=64).eval()
        x = torch.randn(1, _LONG, 64, generator=torch.Generator().manual_seed(0))
        _, _, ratio = paired(
            lambda: layer(x, causal=False), lambda: layer(x[:, :_SHORT], causal=False), 11
        )
    figures["times longer for 4 times the tokens"] = ratio
    return compared(figures, adaptive > fixed + 0.05 and ratio < 8)


def _accuracy(kind: str) -> float:
    """Share of right answers of two layers after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(2 * _KEYS, 32, f"orchid:kind={kind}", layers=2, causal=False, mlp=64)

    def loss(step: int) -> Tensor:
        rows = _rows(64, step)
        return rows.loss(model(rows.inputs))

    fit(model.parameters(), loss, steps=400, lr=3e-3)
    test = _rows(500, 1_000_000)
    with torch.no_grad():
        return test.accuracy(model(test.inputs))


def _rows(count: int, seed: int) -> Batch:
    """Pairs of keys and the values that they have in this row, then a key that was among them."""
    made = torch.Generator().manual_seed(seed)
    values = torch.randint(_KEYS, (count, _KEYS), generator=made) + _KEYS
    keys = torch.randint(_KEYS, (count, _PAIRS), generator=made)
    asked = keys.gather(1, torch.randint(_PAIRS, (count, 1), generator=made))
    told = torch.stack((keys, values.gather(1, keys)), -1).flatten(1)
    inputs = torch.cat((told, asked), 1)
    targets = torch.zeros_like(inputs)
    targets[:, -1:] = values.gather(1, asked)
    return Batch(inputs, targets, targets > 0)
