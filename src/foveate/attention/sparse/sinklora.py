"""SinkLoRA: grouped attention with shifted heads and global sinks for training (2024, paper 28)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Attention, Call, Pattern, Result
from foveate.ops import Mask
from foveate.registry import Card, register


@register(
    Card(
        name="sinklora",
        title="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large "
        "Language Models",
        year=2024,
        paper=28,
        claim="fine-tuning in groups with fewer shifted heads and global sinks recovers 92% of "
        "the gain of dense fine-tuning, plain shifted groups 39%",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="fine-tune",
        phases=("prefill",),
        selection_causal=True,
        cost="O(L·ratio·L·D) time, O(L·D) memory",
        decoding="dense: the pattern is for training, the weights are used with dense attention",
        confidence="high for shifted groups (rho=1, sinks=0); low for the exact regrouping of "
        "heads, which the released code lacks",
        small={"ratio": 0.2, "block": 16},
        full={"ratio": 1.0, "rho": 0.0},
    )
)
@dataclass(frozen=True, kw_only=True)
class SinkLoRA(Attention):
    """Causal attention inside groups of ratio * L tokens; some heads' groups are shifted by half.

    Of the last half of the query heads the last share `rho` is shifted: its first group is half a
    group long. The first `sinks` tokens are seen by all. rho=1 with sinks=0 is the shifted sparse
    attention of LongLoRA; the default is SinkLoRA's. No group ever wraps around.
    """

    block: int = 64
    ratio: float = 0.25
    rho: float = 0.5
    sinks: int = 4

    def __post_init__(self) -> None:
        ops.check_block("block", self.block)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho must be in [0, 1], got {self.rho}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Attention under the groups of every head."""
        size, heads = math.ceil(self.ratio * k.shape[2]), q.shape[1]
        moved = round(self.rho * (heads // 2))
        shifts = (0,) * (heads - moved) + (size - size // 2,) * moved
        groups = _Groups(block=self.block, size=size, shifts=shifts, sinks=self.sinks)
        return groups.compute(q, k, v, call)


@dataclass(frozen=True, kw_only=True)
class _Groups(Pattern):
    """Sinks and groups of `size` positions, of each head `shifts` positions earlier."""

    size: int
    shifts: tuple[int, ...]
    sinks: int

    def mask(self, q_len: int, k_len: int, call: Call) -> Mask:
        """Sinks or group."""
        same = len(set(self.shifts)) == 1
        near = _groups(self.size, torch.tensor(self.shifts[:1] if same else self.shifts))
        return near | ops.sinks(self.sinks) if self.sinks else near


def _groups(size: int, shifts: Tensor) -> Mask:
    """A query sees the keys of its own group: equal (position + shift) // size."""

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        shift = shifts.to(h.device)[h]
        return (q + shift) // size == (k + shift) // size

    def bounds(b: Tensor, h: Tensor, *tile: Tensor) -> tuple[Tensor, Tensor]:
        shift = shifts.to(h.device)[h]
        q_lo, q_hi, k_lo, k_hi = ((x + shift) // size for x in tile)
        inside = (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
        return (k_lo <= q_hi) & (q_lo <= k_hi), inside

    def runs(b: Tensor, h: Tensor, q: Tensor) -> Tensor:
        shift = shifts.to(h.device)[h]
        first = (q + shift) // size * size - shift
        return torch.stack((first, first + size), -1)[..., None, :]

    return Mask(predicate, bounds, heads=len(shifts), name=f"groups of {size}", runs=runs)
