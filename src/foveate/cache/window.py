"""Attention sinks plus the recent tokens: the cache that never grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.base import Eviction
from foveate.registry import Card, register


@register(
    Card(
        name="window",
        title="Efficient Streaming Language Models with Attention Sinks (StreamingLLM)",
        claim="with the first few tokens kept, a window of recent tokens decodes without end",
        kind="cache",
        family="decode",
        year=2023,
        cost="O(budget) memory; no scores",
        decoding="the budget holds at every step; positions go on counting the tokens seen",
        confidence="definition; keys keep their true positions, the paper counts within the cache",
        small={"budget": 16, "sinks": 2},
        full={"budget": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class Window(Eviction):
    """Keeps the first `sinks` tokens and the last `budget` − `sinks`."""

    evicts_decoding: ClassVar[bool] = True

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sinks < self.budget:
            raise ValueError(
                f"sinks must be at least 0 and below the budget {self.budget}, got {self.sinks}"
            )

    def keep(self, q: Tensor, k: Tensor, *, scale: float | None) -> Tensor:
        """The same slots for every head."""
        heads, n = k.shape[1:3]
        slots = torch.arange(min(self.budget, n), device=k.device)
        slots[self.sinks :] += n - slots.numel()
        return slots.expand(heads, -1)
