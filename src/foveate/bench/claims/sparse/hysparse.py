"""HySparse (2026, paper 223): sparse layers on shared keys against windows in their place."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import Recaller, accuracy, recall
from foveate.nn.sparse.hysparse import HySparse
from foveate.ops import BlockLayout, Mask

CLAIM = "after equal steps, layers on shared keys recall more than windows, beyond their window"

_DIM = 64
_SIZES: dict[str, Any] = {
    "kv_heads": 1,
    "sparse_layers": 3,
    "block": 8,
    "blocks": 2,
    "window": 8,
    "mlp": 0,
}


def measure() -> Outcome:
    """Multi-query recall over 64 tokens with one full layer and three others, windows of 8."""
    figures = {
        f"accuracy, {name}": accuracy(recall(partial(_model, kind), steps=300))
        for name, kind in (("shared keys", HySparse), ("windows", _Windows))
    }
    shared, windows = figures.values()
    with torch.no_grad():
        _, state = HySparse(_DIM, 2, **_SIZES)(torch.randn(1, 1024, _DIM), return_state=True)
    held = [state.keys, state.values, *(x for pair in state.near for x in pair)]
    full = 4 * (state.keys.nbytes + state.values.nbytes)
    figures["cache bytes over full attention's, 1k tokens"] = sum(x.nbytes for x in held) / full
    return Outcome(figures, shared > windows)


class _Windows(HySparse):
    """The same layers, but no sparse layer reads a block of the full layer's keys."""

    def select(self, q: Tensor, k: Tensor, lse: Tensor, mask: Mask | None = None) -> BlockLayout:
        """No blocks."""
        lengths = (q.shape[2], k.shape[2])
        none = torch.zeros_like(ops.causal_map(lengths, (1, self.block)))
        return ops.from_map(none[None, None], (1, self.block), lengths)


def _model(kind: type[HySparse]) -> Recaller:
    """The layers in a model that can recall."""
    return Recaller([kind(_DIM, 2, **_SIZES)], _DIM)
