"""Mamba (2023): what steps that depend on the token are good for."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.bench.claims import Outcome
from foveate.nn import Transformer
from foveate.nn.linear.s6 import SelectiveScan
from foveate.tasks.batch import Batch
from foveate.tasks.train import fit

CLAIM = "a selective scan picks tokens out of noise and repeats them, a scan of fixed steps cannot"

_SYMBOLS, _PICKED, _NOISE, _STEPS = 8, 4, 16, 300


class Unselective(SelectiveScan):
    """The same recurrence with the step, B and C of a token of ones, whatever the token."""

    def selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Δ, B and C that do not depend on x."""
        return super().selected(torch.ones_like(x))


def measure() -> Outcome:
    """4 of 8 symbols, strewn among 16 other tokens, are to be repeated in their order."""
    chosen, fixed = _accuracy(selective=True), _accuracy(selective=False)
    figures = {"accuracy, selective": chosen, "accuracy, fixed steps": fixed, "chance": 1 / 8}
    return Outcome(figures, chosen > fixed + 0.1)


def _accuracy(selective: bool) -> float:
    """Share of right symbols of a model of two layers after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(_SYMBOLS + 2, 32, "s6:states=8", layers=2, mlp=0, tie=False)
    if not selective:
        for part in model.modules():
            if isinstance(part, SelectiveScan):
                part.__class__ = Unselective

    def loss(step: int) -> Tensor:
        rows = _rows(32, step)
        return rows.loss(model(rows.inputs))

    fit(model.parameters(), loss, steps=_STEPS, lr=5e-3)
    test = _rows(500, 100_000)
    with torch.no_grad():
        return test.accuracy(model(test.inputs))


def _rows(count: int, seed: int) -> Batch:
    """Symbols at random places among noise (token 0), then as many requests (token 1)."""
    made = torch.Generator().manual_seed(seed)
    symbols = torch.randint(_SYMBOLS, (count, _PICKED), generator=made) + 2
    places = torch.rand(count, _PICKED + _NOISE, generator=made).argsort(1)[:, :_PICKED]
    told = torch.zeros(count, _PICKED + _NOISE, dtype=torch.long)
    told.scatter_(1, places.sort(1).values, symbols)
    asked = torch.ones_like(symbols)
    targets = torch.cat((torch.zeros_like(told), symbols), 1)
    return Batch(torch.cat((told, asked), 1), targets, targets > 0)
