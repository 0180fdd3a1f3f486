"""Attention sinks plus the recent tokens: the cache that never grows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.cache.base import Bounded, Packed
from foveate.registry import Card, register


@register(
    Card(
        name="window",
        title="Efficient Streaming Language Models with Attention Sinks (StreamingLLM)",
        claim="with the first few tokens kept, a window of recent tokens decodes without end",
        kind="cache",
        family="decode",
        year=2023,
        cost="O(budget + buffer) memory; no scores",
        decoding="at most budget + buffer tokens; positions go on counting the tokens seen",
        confidence="definition; keys keep their true positions, the paper counts within the cache",
        small={"budget": 16, "sinks": 2, "buffer": 0},
        full={"budget": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class Window(Bounded):
    """Keeps the first `sinks` tokens and the last `budget` − `sinks`."""

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sinks < self.budget:
            raise ValueError(
                f"sinks must be at least 0 and below the budget {self.budget}, got {self.sinks}"
            )

    def score(self, q: Tensor, k: Tensor, notes: Packed, *, scale: float | None) -> Tensor:
        """The later the better, the first ones above all."""
        order = torch.arange(k.shape[2], dtype=torch.float32, device=k.device)
        order[: self.sinks] = torch.inf
        return order.expand(k.shape[1], -1)
