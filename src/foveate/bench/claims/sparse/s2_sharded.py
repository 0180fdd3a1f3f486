"""S2-Attention (2024, paper 228): heads with shards of their own against heads that share one."""

from __future__ import annotations

from functools import partial
from typing import Any

from foveate.attention.dense.dense import Dense
from foveate.attention.sparse.s2_sharded import S2Sharded
from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import accuracy, attending, judged, recall

CLAIM = "at one density, heads that read different shards recall what heads with one shard cannot"

_SHARDS = 4


def measure() -> Outcome:
    """Accuracy on multi-query recall over 64 tokens after equal steps, four heads."""
    sizes: dict[str, Any] = {"block": 4, "local_blocks": 1, "stride": _SHARDS}
    ways = {
        "dense": Dense(),
        "different shards": S2Sharded(**sizes, head_step=1),
        "one shard": S2Sharded(**sizes, head_step=0),
    }
    figures = {
        f"accuracy, {name}": accuracy(recall(partial(attending, way, heads=_SHARDS)))
        for name, way in ways.items()
    }
    dense, different, one = figures.values()
    return judged(figures, different > one, dense)
