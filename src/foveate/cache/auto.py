"""The best there is for a share of the bytes: fewer bits first, then fewer tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveate import ops
from foveate.cache.base import Store
from foveate.cache.saq import SAQ, Stairs
from foveate.cache.snapkv import SnapKV
from foveate.registry import Card, register

# The length of context at which the share says how many bits there are.
_LENGTH = 1024


@register(
    Card(
        name="auto",
        title="Fewer bits, and where four are too many fewer tokens: a combination by measurement",
        claim="a quarter of the bytes holds a context nearly without loss",
        kind="cache",
        family="decode",
        cost="(bits + 1) / 8 bytes a number; O(window·L·D) once after a prefill that is cut",
        decoding="dense attention, to codes as they are; every decoded token is kept",
        confidence="`saq` and `snapkv`, combined in the way that measured best",
        small={"share": 0.2, "recent": 8, "window": 4, "least": 16},
        full={"share": 1.0},
    )
)
@dataclass(frozen=True, kw_only=True)
class Auto(Store):
    """Holds prompts of 1,024 tokens and more in at most `share` of the bytes of a full cache.

    Numbers have 16 (exact), 8 or 4 bits, the most that fit. Where 4 bits are too many, a prompt
    also loses the tokens that its last `window` queries attend to least; at least `least` stay.
    The first 4 tokens are exact, and the newest, `recent` up to twice as many.
    """

    share: float = 0.25
    recent: int = 32
    window: int = 32
    least: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        ops.check_block("recent", self.recent)
        if ops.check_block("window", self.window) >= self.least:
            raise ValueError(f"least must be above the window {self.window}, got {self.least}")

    def empty(self, k: Tensor, v: Tensor, *, layer: int) -> Stairs:
        """Nothing held."""
        return self._of(k).empty(k, v, layer=layer)

    def extended(self, held: Stairs, k: Tensor, v: Tensor) -> Stairs:
        """What is held, and the codes of what is no longer recent."""
        return self._of(k).extended(held, k, v)

    def chosen(self, q: Tensor, k: Tensor, *, scale: float | None) -> Tensor | None:
        """The best-voted tokens of a prompt that is too long."""
        count = self._kept(k.shape[2], self._of(k), k.shape[3], k.element_size())
        if count == k.shape[2]:
            return None
        votes = SnapKV(budget=count, window=self.window)
        kept = votes.keep(votes.score(q, k, {}, scale=scale))
        return kept.nonzero()[:, 1].view(len(kept), count)

    def attend(self, q: Tensor, held: Stairs, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention to codes, exact tokens and those of the call."""
        return self._of(k).attend(q, held, k, v, **options)

    def tensors(self, held: Stairs) -> list[Tensor]:
        """Exact tokens and codes."""
        return SAQ().tensors(held)

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
        """Those of the codes and exact tokens of what is left of the prompt and of what came."""
        stairs = self.stairs(dim, itemsize)
        kept = self._kept(prompt, stairs, dim, itemsize)
        sizes = {"kv_heads": kv_heads, "dim": dim, "itemsize": itemsize}
        return stairs.claimed_bytes(kept + seen - prompt, kept, **sizes)

    def stairs(self, dim: int, itemsize: int) -> SAQ:
        """What holds tokens whose heads have `dim` numbers of `itemsize` bytes."""
        options: dict[str, Any] = {"block": self.recent, "recent": self.recent}
        options["group"] = math.gcd(dim, self.recent, 32)
        found = [SAQ(bits=bits, **options) for bits in ((16,), (16, 8), (16, 4))]
        fit = (x for x in found if self._fits(_LENGTH, x, dim, itemsize))
        return next(fit, found[-1])

    def _of(self, k: Tensor) -> SAQ:
        """What holds tokens like k."""
        return self.stairs(k.shape[3], k.element_size())

    def _fits(self, prompt: int, stairs: SAQ, dim: int, itemsize: int) -> bool:
        """Whether all of a prompt can be held."""
        held = stairs.claimed_bytes(prompt, prompt, kv_heads=1, dim=dim, itemsize=itemsize)
        return held <= self.share * prompt * 2 * dim * itemsize

    def _kept(self, prompt: int, stairs: SAQ, dim: int, itemsize: int) -> int:
        """Tokens of a prompt that are held."""
        if prompt <= self.least or self._fits(prompt, stairs, dim, itemsize):
            return prompt
        exact, coded = stairs.first + stairs.recent, float(dim * itemsize)
        if stairs.bits[1:]:
            coded = ops.quantized_bytes(dim, stairs.bits[1], group=stairs.group)
        # Whole blocks beside the exact tokens use the room best.
        room = (self.share * prompt - exact) * dim * itemsize / coded
        blocks = min(int(room), prompt - exact) // stairs.block
        return max(exact + blocks * stairs.block, self.least)
