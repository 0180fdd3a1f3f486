"""Lamina (2024, paper 168): what travels is little, and the parts merge to the whole."""

import torch

from foveate import ops
from foveate.attention.decode._offload import Shard, traffic
from foveate.bench.claims import Outcome

CLAIM = (
    "workers that hold the cache by head or by sequence decode as one, the query sent before the "
    "new key, and what travels is below a hundredth of what they read"
)

_Q_HEADS, _KV_HEADS, _DIM = 32, 8, 128
_LENGTH, _STEPS = 8192, 4


def measure() -> Outcome:
    """Numbers that travel over numbers read, per layer and token; difference from one place."""
    read = 2 * _KV_HEADS * _DIM * _LENGTH
    figures: dict[str, float] = {}
    for split in ("head", "sequence"):
        moved = sum(traffic(_Q_HEADS, _KV_HEADS, _DIM, workers=2, split=split))
        figures[f"share that travels at 8k, by {split}"] = moved / read
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 2048, 64, generator=made) for h in (9, 3, 3))
    start = 2048 - _STEPS
    cuts = ((0, start // 2), (start // 2, start))
    shards = [Shard(k[:, :, lo:hi], v[:, :, lo:hi]) for lo, hi in cuts]
    gap = 0.0
    for t in range(start, 2048):
        now = slice(t, t + 1)
        for shard in shards:
            shard.ask(q[:, :, now])
        shards[t % 2].extend(k[:, :, now], v[:, :, now])
        out, _ = ops.merge([shard.result() for shard in shards])
        want = ops.attend(q[:, :, now], k[:, :, : t + 1], v[:, :, : t + 1])
        gap = max(gap, float((out - want).abs().max()))
    figures["largest difference from one place"] = gap
    share = max(list(figures.values())[:2])
    remark = "throughput per dollar is a matter of two kinds of machines"
    return Outcome(figures, share < 1e-2 and gap < 1e-5, remark)
