"""HySparse (2026, paper 223): sparse layers on shared keys against windows in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.bench.claims import Outcome
from foveate.nn.sparse.hysparse import HySparse
from foveate.ops import BlockLayout, Mask
from foveate.tasks.mqar import mqar
from foveate.tasks.train import fit

CLAIM = "after equal steps, layers on shared keys recall more than windows, beyond their window"

_DIM, _VOCABULARY, _STEPS = 32, 256, 200
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
        f"accuracy, {name}": _accuracy(kind)
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


class _Recaller(nn.Module):
    """Embedding, a short causal convolution, the layers, a head."""

    def __init__(self, layers: HySparse) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(_VOCABULARY, _DIM), layers
        self.conv = nn.Conv1d(_DIM, _DIM, 3, groups=_DIM)
        self.head = nn.Sequential(nn.RMSNorm(_DIM), nn.Linear(_DIM, _VOCABULARY))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, L, vocabulary)."""
        x = self.embed(ids).transpose(1, 2)
        x = x + self.conv(nn.functional.pad(x, (2, 0)))
        logits: Tensor = self.head(self.layers(x.transpose(1, 2)))
        return logits


def _accuracy(kind: type[HySparse]) -> float:
    """Of a model trained from equal weights on equal batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Recaller(kind(_DIM, 2, **_SIZES))

    def loss(step: int) -> Tensor:
        batch = mqar(32, seed=step, spread=1.0, filler=False)
        return batch.loss(model(batch.inputs))

    fit(model.parameters(), loss, steps=_STEPS, lr=1e-2)
    test = mqar(300, seed=100_000, spread=1.0, filler=False)
    with torch.no_grad():
        return test.accuracy(model(test.inputs))
