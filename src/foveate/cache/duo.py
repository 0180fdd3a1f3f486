"""Some kv heads keep everything, all others attention sinks and the recent tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from foveate.cache.base import Eviction
from foveate.cache.window import Window
from foveate.registry import Card, register


@register(
    Card(
        name="duo",
        title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming "
        "Heads",
        claim="only the heads that retrieve need every token; the others do with a window",
        kind="cache",
        family="decode",
        year=2024,
        cost="O(budget + buffer) memory of every streaming head, O(L) of the others; no scores",
        decoding="every token for the heads in `full`, at most budget + buffer for the others",
        confidence="definition; which heads are full is given, the paper trains a gate for each",
        small={"budget": 16, "sinks": 2, "buffer": 0, "full": (1,)},
        full={"budget": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class Duo(Window):
    """Heads in `full` (numbers of kv heads) keep every token, others as `window` does.

    `Record.cache_plan` makes one for every layer from the scores of heads.
    """

    full: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(h < 0 for h in self.full) or len(set(self.full)) < len(self.full):
            raise ValueError(f"full must name different kv heads from 0 on, got {self.full}")

    @property
    def read_densely(self) -> bool:
        """Where heads hold different numbers of tokens."""
        return bool(self.full)

    def load(self, lengths: Sequence[int]) -> float:
        """What a streaming head holds."""
        return min(lengths)

    def keep(self, scores: Tensor) -> Tensor:
        """Everything in full heads, the first and the last tokens in the others."""
        kept = super().keep(scores)
        if self.full and max(self.full) >= len(kept):
            raise ValueError(
                f"duo keeps kv head {max(self.full)} full, but the layer has {len(kept)}"
            )
        kept[list(self.full)] = scores[list(self.full)] > -float("inf")
        return kept

    def claimed_bytes(
        self,
        seen: int,
        prompt: int,
        *,
        kv_heads: int,
        dim: int,
        itemsize: int,
        exact: int | None = None,
    ) -> float:
        """All tokens of the full heads, the window of the others."""
        sizes = {"dim": dim, "itemsize": itemsize}
        streaming = super().claimed_bytes(seen, prompt, kv_heads=kv_heads - len(self.full), **sizes)
        whole = Eviction(budget=1 << 40)
        return streaming + whole.claimed_bytes(seen, prompt, kv_heads=len(self.full), **sizes)
