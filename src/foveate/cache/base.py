"""Base classes of KV-cache policies: `Eviction` drops tokens, `Codec` stores them smaller.

A policy is a plain description with pure functions on tensors; the layer that runs it inside a
transformers cache is in `foveate.hf.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate import ops
from foveate.registry import Card

Packed = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """A frozen description of what a cache layer keeps; its fields are its options."""

    card: ClassVar[Card]

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
        """Bytes one layer holds for one row after `seen` tokens, the first `prompt` at once.

        exact counts the tokens a codec holds in full precision too, which the text decides; None
        stands for the most there can be.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Eviction(CachePolicy):
    """Keeps at most `budget` tokens per kv head of what a prefill brought.

    With `evicts_decoding` the budget also holds after every decoded token; without it, decoded
    tokens are all kept on top of it.
    """

    evicts_decoding: ClassVar[bool] = False

    budget: int = 1024

    def __post_init__(self) -> None:
        ops.check_block("budget", self.budget)

    def keep(self, q: Tensor, k: Tensor, *, scale: float | None) -> Tensor:
        """Slots to keep, (Hkv, m) ascending with m <= budget, for one row that holds more.

        q (1, Hq, l, D) are the queries of the call that ends, k (1, Hkv, n, D) all keys it saw;
        the queries are the last l of the n. No padding is among them.
        """
        raise NotImplementedError

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
        """Keys and values of the kept tokens."""
        kept = min(prompt, self.budget) + seen - prompt
        tokens = min(seen, self.budget) if self.evicts_decoding else kept
        return 2.0 * tokens * kv_heads * dim * itemsize


@dataclass(frozen=True, kw_only=True)
class Codec(CachePolicy):
    """Stores every token in another form and gives back full keys and values on reading.

    With `pre_rope` the keys are encoded without their rotary embedding, which is taken off before
    and put on again after. Packed tensors have the batch on axis 0 and the tokens on axis 1.
    """

    pre_rope: ClassVar[bool] = False

    def encode(self, k: Tensor, v: Tensor, *, valid: Tensor | None, state: Packed) -> Packed:
        """Pack k, v (B, Hkv, n, D); `state` (batch on axis 0) outlives the call.

        valid (B, n) bool marks real tokens; statistics must not depend on the others.
        """
        raise NotImplementedError

    def decode(self, packed: Packed, *, state: Packed) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hkv, n, D) of packed tokens, in float32."""
        raise NotImplementedError

    def exact(self, hidden: Tensor, valid: Tensor | None) -> Tensor | None:
        """Tokens of a prefill kept in full precision as well: (B, L) bool, None for none.

        hidden (B, L, width) is the layer's input before its norm.
        """
        return None
