"""HiP (2024, paper 15): what a tree search finds, between a fixed window and the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import BlockSparse, Call
from foveate.attention.sparse.hip import HiP
from foveate.attention.sparse.sink_window import SinkWindow
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import Judged, judge
from foveate.ops import BlockLayout

CLAIM = "a tree search keeps more mass than a window of its budget, and comes near the best blocks"

_TOKENS, _BUDGET, _WINDOW, _SINKS = 4096, 512, 256, 16


def measure() -> Outcome:
    """Retained mass and perplexity at one budget: window, tree search, best key blocks."""
    total = _BUDGET + _WINDOW
    ways: dict[str, Judged] = {
        "window": judge(_TOKENS, SinkWindow(sinks=_SINKS, window=total, dense_layers=(0, 1, 2))),
        "search": judge(_TOKENS, HiP(budget=_BUDGET, window=_WINDOW, sinks=_SINKS)),
        "oracle": judge(_TOKENS, _Oracle(dense_layers=(0, 1, 2))),
    }
    mass = {name: way.retained_mass or 1.0 for name, way in ways.items()}
    figures = {f"retained mass, {name}": share for name, share in mass.items()}
    figures |= {f"perplexity, {name}": way.perplexity for name, way in ways.items()}
    better = ways["search"].perplexity < ways["window"].perplexity
    return Outcome(figures, mass["window"] < mass["search"] and better)


@dataclass(frozen=True, kw_only=True)
class _Oracle(BlockSparse):
    """For 64 queries at once the pairs of keys with the largest attention probability."""

    card = HiP.card

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout | None:
        """Sinks, window and the best of the rest."""
        lengths, size = (q.shape[2], k.shape[2]), (64, 2)
        _, lse = ops.attend(q, k, k, return_lse=True, **call.options())
        mass = ops.block_mass(q, k, lse, size, reduce_q="max", reduce_k="max", **call.options())
        near = (ops.sinks(_SINKS) | ops.window(_WINDOW)) & ops.causal()
        forced = near.to_layout(*lengths, size).to_bool()
        seen = ops.causal_map(lengths, size)
        best = ops.top_k(mass.masked_fill(forced, 0.0), _BUDGET // 2, visible=seen & ~forced[0, 0])
        return ops.from_map(best | forced, size, lengths)
