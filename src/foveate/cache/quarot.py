"""QuaRot: a Hadamard matrix takes the outliers out of every head's keys and values (2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveate import ops
from foveate.cache.saq import SAQ, Stairs
from foveate.registry import Card, register


@register(
    Card(
        name="quarot",
        title="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        claim="a rotation of each head, keys after their rotary embedding, lets 4 bits suffice",
        kind="cache",
        family="decode",
        year=2024,
        cost="bits/8 + 4/group bytes a number; O(D·log D) per head and new token",
        decoding="queries are rotated too, so that codes are read as they are",
        confidence="rotation and groups checked against the released code, which clips at 0.95 "
        "and keeps no token exact; a staircase of bits comes with `saq`, by default it has one",
        small={"bits": (16, 2), "block": 8, "group": 8, "first": 2, "recent": 3},
        full={"bits": (16,)},
    )
)
@dataclass(frozen=True, kw_only=True)
class QuaRot(SAQ):
    """Codes of tokens whose keys and values were multiplied by a Hadamard matrix, head by head.

    Per token, `group` channels share a scale. All else is as in `saq`: the `recent` newest tokens,
    and up to `block` before them, are exact, and so are the `first` of a row; `bits` are those of
    older blocks. Unlike in `rotate_kv` keys are rotated after their rotary embedding: outliers
    spread less well, but nothing has to be rebuilt to be read. `rotate` false leaves it out.
    """

    group: int = 64
    rotate: bool = True

    @property
    def key_tile(self) -> tuple[int, int]:
        """Channels of one token."""
        return 1, self.group

    def extended(self, held: Stairs, k: Tensor, v: Tensor) -> Stairs:
        """What is held once the tokens k, v (1, Hkv, n, ·) have come, too; all of it rotated."""
        return super().extended(held, self._turned(k), self._turned(v))

    def attend(self, q: Tensor, held: Stairs, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention among what is rotated, rotated back."""
        turned = (self._turned(x) for x in (k, v))
        return self._turned(super().attend(self._turned(q), held, *turned, **options))

    def _turned(self, x: Tensor) -> Tensor:
        """Heads times the matrix, which is its own inverse."""
        return ops.hadamard(x.float()).to(x.dtype) if self.rotate else x
