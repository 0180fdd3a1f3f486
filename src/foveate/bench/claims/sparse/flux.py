"""Flux (2026, paper 237): routers that give full attention to the prompts that need it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from foveate.attention.base import Record
from foveate.attention.sparse.flux import Flux
from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import toy
from foveate.bench.train import text_loss, train
from foveate.hf.attach import attach
from foveate.hf.parts import body
from foveate.tasks.train import fit

CLAIM = "routers keep more layers full for recall over a distance than for local text"

_LENGTH, _LAYERS, _KEYS, _VALUES, _WORDS = 128, 2, 16, 4, 64
_PAIRS = _KEYS * _VALUES


def measure() -> Outcome:
    """Share of full layers for fresh prompts of two tasks, under one and the same target."""
    model = toy(vocabulary=_PAIRS + _KEYS + _WORDS, length=_LENGTH, layers=_LAYERS)

    def loss(step: int) -> Tensor:
        return text_loss(model, torch.cat((recall(8, 2 * step), local(8, 2 * step + 1))))

    learned = fit(model.parameters(), loss, steps=400, lr=3e-3)
    # Both tasks have the same target, so that only the model's loss can tell them apart.
    mechanism = Flux(sinks=1, window=8, block=8, pool=16, targets=(1.0, 1.0))
    texts = [recall(100, 5000), local(100, 5001)]
    routed = train(model, mechanism, texts, steps=400, lr=1e-3)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "routers"
        routed.write(file)
        served = Flux(sinks=1, window=8, block=8, pool=16, router=str(file))
        full = {"recall": _full(model, served, recall(16, 9000))}
        full["local"] = _full(model, served, local(16, 9001))
    figures = {f"share of full layers, {name}": share for name, share in full.items()}
    figures["loss of the model"] = learned[-1]
    return Outcome(figures, full["recall"] > full["local"])


def recall(rows: int, seed: int) -> Tensor:
    """16 pairs, each one token, then keys, each followed by its pair once more: (rows, 128)."""
    made = torch.Generator().manual_seed(seed)
    values = torch.randint(_VALUES, (rows, _KEYS), generator=made)
    pairs = torch.arange(_KEYS) * _VALUES + values
    shuffled = pairs.gather(1, torch.rand(rows, _KEYS, generator=made).argsort(1))
    asked = torch.randint(_KEYS, (rows, (_LENGTH - _KEYS) // 2), generator=made)
    answered = torch.stack((_PAIRS + asked, pairs.gather(1, asked)), -1)
    return torch.cat((shuffled, answered.flatten(1)), 1)


def local(rows: int, seed: int) -> Tensor:
    """Each token is followed by one of two, always the same two: (rows, 128)."""
    made = torch.Generator().manual_seed(seed)
    table = torch.randint(_WORDS, (_WORDS, 2), generator=torch.Generator().manual_seed(0))
    ids = [torch.randint(_WORDS, (rows,), generator=made)]
    for _ in range(_LENGTH - 1):
        ids.append(table[ids[-1], torch.randint(2, (rows,), generator=made)])
    return torch.stack(ids, 1) + _PAIRS + _KEYS


@torch.no_grad()
def _full(model: Any, mechanism: Flux, ids: Tensor) -> float:
    """Share of calls, over layers and rows, that read everything."""
    seen: list[Record] = []
    with attach(model, prefill=mechanism) as attached:
        attached.record = seen.append
        body(model)(ids, use_cache=False)
    return sum(r.density == 1 for r in seen) / len(seen)
