"""Gated DeltaNet (2024): keys that are written twice."""

from __future__ import annotations

import torch

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import compared, pairs_and_questions, recalled_at_once
from foveate.tasks.batch import Batch

CLAIM = "where keys are written twice, the delta rule recalls the last value better than gates"

_PAIRS, _VOCABULARY = 8, 64


def measure() -> Outcome:
    """Eight keys, the same with new values, then a question about each; 400 steps.

    One layer of two heads: the decay that a head of the gated layer starts from is drawn at random.
    """
    sizes = "heads=2,expand_k=1.0,expand_v=1.0"
    patterns = {
        "gated deltanet": f"gated_deltanet:{sizes},conv=1",
        "deltanet": f"deltanet:{sizes},conv=1",
        "gla": f"gla:{sizes}",
    }
    figures = recalled_at_once(patterns, _overwritten, vocabulary=_VOCABULARY, steps=400)
    gated, delta, gla = figures.values()
    return compared(figures, min(gated, delta) > gla)


def _overwritten(count: int, seed: int) -> Batch:
    """Rows of pairs before which the same keys stood with other values, in another order."""
    last = pairs_and_questions(_PAIRS, _VOCABULARY)(count, seed)
    made = torch.Generator().manual_seed(seed)
    order = torch.rand(count, _PAIRS, generator=made).argsort(1)
    keys = last.inputs[:, : 2 * _PAIRS : 2].gather(1, order)
    values = torch.randint(_VOCABULARY // 2, _VOCABULARY, keys.shape, generator=made)
    first = torch.stack((keys, values), -1).flatten(1)
    nothing = torch.zeros_like(first)
    return Batch(
        torch.cat((first, last.inputs), 1),
        torch.cat((nothing, last.targets), 1),
        torch.cat((nothing.bool(), last.mask), 1),
    )
