"""Base classes of KV-cache policies: `Eviction` drops tokens, others hold them in another form.

A policy is a plain description with pure functions on tensors; the layer that runs it inside a
transformers cache is in `foveate.hf.layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate import ops
from foveate.attention._trained import Trainable
from foveate.cache._slots import Slots
from foveate.registry import Card

__all__ = [
    "Bounded",
    "CachePolicy",
    "Codec",
    "Eviction",
    "Packed",
    "Shared",
    "Slots",
    "Store",
    "Tables",
]

Packed = dict[str, Tensor]

Tables = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rotary tables (cos, sin), each (B, L, R), of positions (B, L)."""


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """A frozen description of what a cache layer keeps; its fields are its options."""

    card: ClassVar[Card]

    @property
    def read_densely(self) -> bool:
        """Whether only dense attention can read what is held, as it lies there."""
        return False

    def check_layers(self, layers: int) -> None:
        """ValueError when it was trained on a model with another number of layers."""
        if isinstance(self, Trainable) and (found := self.read()) is not None:
            found.check_model(found.shape._replace(layers=layers))

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
    """Keeps at most `budget` tokens per kv head of what a prefill brought, and all decoded ones.

    A policy scores what a row holds; the highest scores stay. It is shown one row at a time,
    without padding: the queries q (1, Hq, l, D) of the call that ends, the last l of n tokens,
    and the keys k (1, Hkv, n, D) they saw. `notes` names numbers it holds of every slot, (Hkv, n)
    each, in float32: "position" and "count", the tokens behind a slot, are known from the start,
    others begin at 0. With "count" noted, a slot weighs as much as that many tokens; with
    "position", `merge` is given the model's rotary tables.
    """

    evicts_decoding: ClassVar[bool] = False

    budget: int = 1024

    def __post_init__(self) -> None:
        ops.check_block("budget", self.budget)

    @property
    def notes(self) -> tuple[str, ...]:
        """Names of the numbers held of every slot."""
        return ()

    @property
    def read_densely(self) -> bool:
        """Where kv heads can keep different numbers of slots, or slots weigh differently."""
        return "count" in self.notes

    def load(self, lengths: Sequence[int]) -> float:
        """What a row whose kv heads hold so many slots holds of its budget: their mean."""
        return sum(lengths) / len(lengths)

    def due(self, held: float, *, prefill: bool) -> bool:
        """Whether a row that holds so much of its budget evicts when a call ends."""
        return prefill and held > self.budget

    def observe(self, q: Tensor, k: Tensor, notes: Packed, *, scale: float | None) -> Packed:
        """Notes that change with the call, (Hkv, n); called after every call."""
        return {}

    def score(self, q: Tensor, k: Tensor, notes: Packed, *, scale: float | None) -> Tensor:
        """How much every slot matters, (Hkv, n) float32; inf: it must stay."""
        raise NotImplementedError

    def keep(self, scores: Tensor) -> Tensor:
        """Slots that stay, bool like scores (Hkv, n); −inf marks what is no slot."""
        return ops.top_k(scores, self.budget, visible=scores > -torch.inf)

    def merge(
        self, row: Slots, scores: Tensor, kept: Tensor, *, rope: Tables | None, layer: int
    ) -> Slots:
        """What a row holds from now on; by default the slots that were kept, as they are."""
        return row.keep(kept)

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
        """Keys, values and notes of the slots held."""
        kept = self.budget if self.due(prompt, prefill=True) else prompt
        slots = self.slots(kept, seen - prompt)
        return kv_heads * slots * (2.0 * dim * itemsize + 4 * len(self.notes))

    def slots(self, kept: int, decoded: int) -> int:
        """Slots per kv head, on average, after a prefill left `kept` of them."""
        return kept + decoded


@dataclass(frozen=True, kw_only=True)
class Bounded(Eviction):
    """Evicts decoded tokens too, whenever more than `buffer` slots lie over the budget.

    A buffer of 0 holds the budget after every token, but every token then pays for an eviction.
    """

    evicts_decoding: ClassVar[bool] = True

    buffer: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer < 0:
            raise ValueError(f"buffer must be at least 0, got {self.buffer}")

    def due(self, held: float, *, prefill: bool) -> bool:
        """After a prefill whenever the budget is exceeded, later when the buffer is full too."""
        return held > self.budget + (0 if prefill else self.buffer)

    def slots(self, kept: int, decoded: int) -> int:
        """The budget, and the decoded tokens since the last eviction."""
        over = kept + decoded - self.budget
        return self.budget + (over if over < 0 else over % (self.buffer + 1))


@dataclass(frozen=True, kw_only=True)
class Shared(Eviction):
    """The kv heads of a layer share its budget by their scores.

    Each head is sure of the share `floor` of an equal part (1: all heads keep equally many).
    """

    floor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor must be above 0 and at most 1, got {self.floor}")

    @property
    def read_densely(self) -> bool:
        """Heads differ where they share."""
        return self.floor < 1 or super().read_densely

    def keep(self, scores: Tensor) -> Tensor:
        """The best of every head, then the best of all heads together."""
        if self.floor == 1:
            return super().keep(scores)
        visible = scores > -torch.inf
        sure = ops.top_k(scores, max(1, int(self.floor * self.budget)), visible=visible)
        joint = scores.masked_fill(sure, torch.inf).flatten()
        kept = ops.top_k(joint, self.budget * scores.shape[0], visible=visible.flatten())
        return kept.view_as(scores)


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


@dataclass(frozen=True, kw_only=True)
class Store(CachePolicy):
    """Holds every row in a form of its own, which it reads itself where it lies.

    Tokens k, v (1, Hkv, n, ·) come without padding, one row at a time.
    """

    @property
    def read_densely(self) -> bool:
        """Nothing else knows the form."""
        return True

    def empty(self, k: Tensor, v: Tensor, *, layer: int) -> Any:
        """What a layer holds of no tokens, made for keys and values like k and v."""
        raise NotImplementedError

    def extended(self, held: Any, k: Tensor, v: Tensor) -> Any:
        """What is held once the tokens k, v have come, too; `held` itself stays as it is."""
        raise NotImplementedError

    def chosen(self, q: Tensor, k: Tensor, *, scale: float | None) -> Tensor | None:
        """Tokens of a call (Hkv, m), ascending, that are to be held once it ends; None: all.

        q (1, Hq, n, D) are its queries, k (1, Hkv, n, D) its keys.
        """
        return None

    def attend(self, q: Tensor, held: Any, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Causal attention of q (1, Hq, n, D), whose keys are k, over what is held and those.

        options: scale and softcap of `ops.attend`.
        """
        raise NotImplementedError

    def tensors(self, held: Any) -> list[Tensor]:
        """The tensors that make up what is held."""
        raise NotImplementedError
