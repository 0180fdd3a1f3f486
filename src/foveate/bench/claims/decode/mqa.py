"""Multi-query attention (2019, paper 209): what a shared key and value head saves in decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch

from foveate.bench.claims import Outcome
from foveate.bench.timing import paired
from foveate.nn.decode.mqa import MQA

CLAIM = "the fewer key and value heads, the fewer bytes a step reads and the faster it is"

_HEADS, _WIDTH, _TOKENS, _BATCH = 8, 64, 4096, 8


@torch.inference_mode()
def measure() -> Outcome:
    """A decoding step over 4,096 tokens of 8 sequences: 8, 2 and 1 kv heads for 8 query heads."""
    figures: dict[str, float] = {}
    steps = {kv_heads: _step(kv_heads) for kv_heads in (_HEADS, 2, 1)}
    gains = []
    for kv_heads, (step, held) in steps.items():
        figures[f"cache MB, {kv_heads} kv heads"] = held / 1e6
        if kv_heads < _HEADS:
            gains.append(paired(steps[_HEADS][0], step, 11)[2])
            figures[f"times faster than full heads, {kv_heads} kv heads"] = gains[-1]
    return Outcome(figures, 1 < gains[0] < gains[1])


def _step(kv_heads: int) -> tuple[Callable[[], object], int]:
    """Attention of one token to a cache, and the bytes of the cache."""
    made = torch.Generator().manual_seed(0)
    layer = MQA(_HEADS * _WIDTH, _HEADS, kv_heads)
    q = torch.randn(_BATCH, _HEADS, 1, _WIDTH, generator=made)
    k, v = torch.randn(2, _BATCH, kv_heads, _TOKENS, _WIDTH, generator=made)
    return lambda: layer.attend(q, k, v, True, None), k.nbytes + v.nbytes
