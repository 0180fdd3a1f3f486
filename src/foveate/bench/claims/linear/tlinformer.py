"""TLinFormer (2025, paper 201): what a compressed history saves, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from foveate import create
from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import spoken
from foveate.bench.timing import paired
from foveate.nn._recurrent import state_bytes
from foveate.nn._stack import Stack

CLAIM = "a Transformer whose layers read a compressed history decodes faster over a long one"

_TOKENS, _WINDOW, _DIM = 4096, 64, 128


def measure() -> Outcome:
    """64 tokens after 4,096, and the bytes kept, by 4 layers; loss on bytes of 2 windows of 32."""
    narrow_pattern = "tlinformer:blocks=1,block_layers=3,window=32,history=16"
    figures = spoken({"compressed history": narrow_pattern}, steps=120, length=64, layers=1)
    figures |= spoken({"attention": "dense"}, steps=120, length=64, layers=3)
    with torch.inference_mode():
        options = {"blocks": 1, "window": _WINDOW, "history": _WINDOW}
        narrow = create("tlinformer", dim=_DIM, heads=4, **options).eval()
        full = Stack(_DIM, "dense*4", heads=4, mlp=8 * _DIM // 3, theta=10_000.0).eval()
        (slow, all_kept), (fast, some_kept) = _decoding(full), _decoding(narrow)
        _, _, faster = paired(slow, fast, 3)
    figures["MB kept, attention"], figures["MB kept, compressed history"] = (
        held / 1e6 for held in (all_kept, some_kept)
    )
    figures["times faster than attention"] = faster
    return Outcome(figures, faster > 1 and some_kept < all_kept)


def _decoding(model: Any) -> tuple[Callable[[], object], int]:
    """A window of tokens one by one after a long row, and the bytes kept before it."""
    x = torch.randn(1, _TOKENS, _DIM, generator=torch.Generator().manual_seed(0))
    _, start = model(x, return_state=True)

    def run() -> object:
        state = start
        for t in range(_WINDOW):
            _, state = model.step(x[:, t], state)
        return state

    return run, state_bytes(start)
