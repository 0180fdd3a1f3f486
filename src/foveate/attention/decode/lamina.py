"""Lamina: attention on machines of its own, split by head or by sequence (2024, paper 168)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Attention, Call, Result, attend_span
from foveate.attention.decode._offload import check_split
from foveate.registry import Card, register


@register(
    Card(
        name="lamina",
        title="Efficient Heterogeneous Large Language Model Decoding with Model-Attention "
        "Disaggregation",
        claim="attention over the cache can run elsewhere while the new key is still made: two "
        "parts merge exactly, and little travels",
        kind="attention",
        family="decode",
        year=2024,
        paper=168,
        pretrained="exact",
        phases=("decode",),
        cost="that of dense attention; (2·Hq + 2·Hkv)·D numbers travel per layer and token",
        decoding="full KV cache, shared out among the workers",
        confidence="high on the identity, medium on the details of the system",
        small={"workers": 2, "split": "sequence"},
    )
)
@dataclass(frozen=True, kw_only=True)
class Lamina(Attention):
    """The shares of `workers`, by `split` (head or sequence), computed one after the other.

    Each attends to what the cache held before the call and to the new tokens apart, and merges;
    `Shard`, `serve` and `Offloaded` of `_offload` do the same in processes of their own.
    """

    workers: int = 2
    split: str = "head"

    def __post_init__(self) -> None:
        check_split(self.workers, self.split)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Every worker's share, merged or put side by side."""
        n, old = k.shape[2], k.shape[2] - q.shape[2]
        if self.split == "sequence" or (call.mask is not None and call.mask.heads > 1):
            cuts = [*(old * w // self.workers for w in range(self.workers)), old, n]
            spans = [(lo, hi) for lo, hi in pairwise(cuts) if lo < hi]
            return Result(*ops.merge([attend_span(q, k, v, *span, call) for span in spans]))
        group, found = q.shape[1] // k.shape[1], []
        for heads in torch.arange(k.shape[1]).tensor_split(min(self.workers, k.shape[1])):
            lo, hi = int(heads[0]), int(heads[-1]) + 1
            own = (q[:, lo * group : hi * group], k[:, lo:hi], v[:, lo:hi])
            spans = [span for span in ((0, old), (old, n)) if span[0] < span[1]]
            found.append(ops.merge([attend_span(*own, *span, call) for span in spans]))
        outs, lses = zip(*found, strict=True)
        return Result(torch.cat(outs, 1), torch.cat(lses, 1))
