"""What the benches feed the kernels: random tensors of a model's shapes, layouts, caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate import ops
from foveate.bench.store import Json

# Caches are read layer after layer, as a model does, so that none is found in the processor's own
# cache: this many bytes of them, or as many layers.
_FAR, _LAYERS = 128 << 20, 32

Inputs = tuple[Tensor, Tensor, Tensor]


class Heads(NamedTuple):
    """Query heads, key-value heads and their dim."""

    q: int
    kv: int
    dim: int

    def shape(self, tokens: int, **more: object) -> Json:
        """The record of a shape."""
        held = {"tokens": tokens, "q_heads": self.q, "kv_heads": self.kv, "dim": self.dim}
        return held | more

    def __str__(self) -> str:
        return f"{self.q}/{self.kv} heads of {self.dim}"


SMALL, LARGE, EQUAL = Heads(9, 3, 64), Heads(32, 8, 128), Heads(9, 9, 64)


def random_qkv(heads: Heads, tokens: int, queries: int | None = None) -> Inputs:
    """Standard normal q, k and v of one sequence, the same every time."""
    made = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads.q, queries or tokens, heads.dim, generator=made)
    k, v = (torch.randn(1, heads.kv, tokens, heads.dim, generator=made) for _ in range(2))
    return q, k, v


def read_and_written(*tensors: Tensor) -> float:
    """Bytes of attention's inputs (q, k, v, in this order) and of its output, each touched once."""
    return float(sum(x.nbytes for x in tensors) + tensors[0].nbytes)


def random_layout(heads: Heads, tokens: int, block: int, density: float) -> ops.BlockLayout:
    """A share of the causal blocks of every query block, its own among them, by query head."""
    lengths, size = (tokens, tokens), (block, block)
    visible = ops.causal_map(lengths, size)
    scores = torch.rand(1, heads.q, *visible.shape, generator=torch.Generator().manual_seed(1))
    scores.masked_fill_(~visible, -1).diagonal(dim1=-2, dim2=-1).fill_(2)
    keep = (density * visible.sum(-1, keepdim=True)).round().clamp_min(1)
    return ops.from_map(scores.argsort(-1, descending=True).argsort(-1) < keep, size, lengths)


def layers_of(parts: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Copies of a cache, enough to leave the processor's own cache behind."""
    count = -(-_FAR // sum(x.nbytes for x in parts))
    copies = [tuple(x.clone() for x in parts) for _ in range(min(count, _LAYERS) - 1)]
    return [tuple(parts), *copies]
