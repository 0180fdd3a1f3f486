"""Hymba (2024, paper 221): heads side by side or layers in turn, and what they keep."""

from __future__ import annotations

import torch

from foveate import create
from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import compared, soon_recalled
from foveate.nn._recurrent import state_bytes

CLAIM = "attention and a scan side by side recall better than in turn, with a far smaller cache"

_PATTERNS = {
    "side by side": "hymba:depth=1,meta=2,states=4,expand=1",
    "in turn": "s6:states=4,expand=1, dense, mlp",
    "scan alone": "s6:states=4,expand=1, mlp",
}


def measure() -> Outcome:
    """Recall of 4 pairs; bytes kept after 4,096 tokens by 8 layers of width 64, windows of 256."""
    figures = soon_recalled(_PATTERNS)
    side, turn, alone = figures.values()
    smaller = _smaller()
    figures["times smaller cache than attention"] = smaller
    return compared(figures, side > max(turn, alone) and smaller > 1.5)


@torch.inference_mode()
def _smaller() -> float:
    """Bytes that 8 layers of attention keep over those of as many hybrid ones."""
    x = torch.randn(1, 4096, 64, generator=torch.Generator().manual_seed(0))
    hybrid = create("hymba", dim=64, heads=4, kv_heads=2, depth=8, window=256, expand=1.0)
    held = state_bytes(hybrid(x, return_state=True)[1])
    keys_and_values = 8 * 2 * x.nbytes
    return keys_and_values / held
