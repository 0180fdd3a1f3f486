"""PrFlash: key blocks visited at random, the nearer the likelier (2024, paper 121)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import BlockSparse, Call
from foveate.attention.sparse._strided import block_numbers
from foveate.ops import BlockLayout
from foveate.registry import Card, register

_WORD = 2**32 - 1


@register(
    Card(
        name="pr_flash",
        title="The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in "
        "Generative AI",
        claim="blocks that are visited at random, the nearer the likelier, stand for all of them",
        kind="attention",
        family="decode",
        year=2024,
        paper=121,
        pretrained="fine-tune",
        cost="O(L·block/(1 - rate)·D) time in expectation, O(L·D + blocks²·heads) memory",
        decoding="the blocks that the same row of a prefill visits, over the full cache",
        confidence="low: only the idea was read; the laws of distance are sensible choices",
        small={"block": 16, "rate": 0.7},
        full={"rate": 1.0},
    )
)
@dataclass(frozen=True, kw_only=True)
class PrFlash(BlockSparse):
    """A query block visits its own block, and one `d` blocks before it with probability rate^d.

    `rate` None stands for 1 / (1 + d). What is visited depends on the `seed`, the layer, the query
    head and the two blocks alone: it is the same at every call, for every row of a batch, and in
    decoding as in the prefill.
    """

    block: int = 64
    rate: float | None = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"rate must be None or in [0, 1], got {self.rate}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout | None:
        """One list of blocks per query head."""
        if self.rate == 1:
            return None
        lengths = q.shape[2], k.shape[2]
        rows, cols = (x.to(q.device) for x in block_numbers(lengths, self.block))
        heads = torch.arange(q.shape[1], device=q.device).view(-1, 1, 1)
        drawn = uniform(self.seed, call.layer, heads, rows, cols)
        visited = (cols <= rows) & (drawn < self.chance(rows - cols))
        return ops.from_map(visited[None], self.block, lengths)

    def chance(self, distance: Tensor) -> Tensor:
        """How likely a block is to be visited from `distance` blocks on (float64)."""
        far = distance.clamp_min(0).double()
        return 1 / (1 + far) if self.rate is None else self.rate**far


def uniform(*keys: int | Tensor) -> Tensor:
    """A number in [0, 1) for each combination of integers that broadcast, always the same one."""
    word = torch.zeros((), dtype=torch.int64)
    for key in keys:
        word = _mixed((word + ((key + 1) * 0x9E3779B9 & _WORD)) & _WORD)
    return word.double() / (_WORD + 1)


def _mixed(word: Tensor) -> Tensor:
    """32 bits, each of which depends on all of those given (multiply and shift, twice)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = ((word ^ (word >> shift)) * factor) & _WORD
    return word ^ (word >> 16)
