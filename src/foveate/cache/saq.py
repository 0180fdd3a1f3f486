"""SAQ: keys and values in fewer bits the older they are (2024, paper 121)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate import ops
from foveate.cache._tokens import Tokens, cut, joined, owned
from foveate.cache.base import Store
from foveate.ops import Quantized
from foveate.ops.quantize import BITS
from foveate.registry import Card, register

Coded = tuple[Quantized, Quantized]


class Stairs(NamedTuple):
    """What is held of one row: its first tokens, codes by level (oldest last), its newest tokens.

    A level but the last holds one block or nothing.
    """

    first: Tokens
    levels: tuple[Coded | None, ...]
    newest: Tokens


@register(
    Card(
        name="saq",
        title="The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in "
        "Generative AI",
        claim="the older a token is, the fewer bits its keys and values need",
        kind="cache",
        family="decode",
        year=2024,
        paper=121,
        cost="bits/8 + 4/group bytes a number; old tokens are read as the codes they are",
        decoding="each block of tokens is requantised when it steps down a level",
        confidence="the schedule of levels was read, that of the newest block inferred; first and "
        "recent tokens kept exact are additions, off at 0",
        small={"bits": (16, 4), "block": 8, "group": 8, "first": 2, "recent": 3},
        full={"bits": (16,)},
    )
)
@dataclass(frozen=True, kw_only=True)
class SAQ(Store):
    """Tokens step down a staircase of `bits`, the first of which, 16, stands for unquantised.

    The `recent` newest tokens, and up to `block` before them, are exact. A full block takes
    bits[1]; each further block pushes it one level down, until it joins all that have bits[-1].
    Keys share a scale over `group` tokens of a channel, values over `group` channels of a token;
    their range is clipped by `clip` (None: 0.7 at 2 bits, else 1). The `first` tokens of a row stay
    exact.
    """

    bits: tuple[int, ...] = (16, 4)
    block: int = 64
    group: int = 32
    recent: int = 64
    first: int = 4
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("block", "group"):
            ops.check_block(name, getattr(self, name))
        for name in ("recent", "first"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ValueError(f"clip must be above 0 and at most 1, got {self.clip}")
        if self.block % self.key_tile[0]:
            raise ValueError(f"group must divide the block of {self.block}, got {self.group}")
        steps = self.bits[1:]
        falling = all(a > b for a, b in zip(self.bits, steps, strict=False))
        if self.bits[:1] != (16,) or not falling or any(n not in BITS for n in steps):
            raise ValueError(
                f"bits must fall from 16 through some of {BITS[::-1]}, like 16/4, got {self.bits}"
            )

    @property
    def key_tile(self) -> tuple[int, int]:
        """Tokens and channels of keys that share a scale."""
        return self.group, 1

    def empty(self, k: Tensor, v: Tensor, *, layer: int) -> Stairs:
        """Nothing held, of keys and values like k and v (1, Hkv, n, ·)."""
        none = k[:, :, :0], v[:, :, :0]
        return Stairs(none, (None,) * (len(self.bits) - 1), none)

    def extended(self, held: Stairs, k: Tensor, v: Tensor) -> Stairs:
        """What is held once the tokens k, v (1, Hkv, n, ·) have come, too."""
        if v.shape[3] % self.group:
            raise ValueError(f"group {self.group} does not divide the {v.shape[3]} value channels")
        first, newest = held.first, joined(held.newest, (k, v))
        if (lack := self.first - first[0].shape[2]) > 0:
            first, newest = joined(first, cut(newest, 0, lack)), cut(newest, lack)
        count = (newest[0].shape[2] - self.recent) // self.block
        if count < 1 or not held.levels:
            return Stairs(owned(first), held.levels, owned(newest))
        old = cut(newest, 0, count * self.block)
        levels = self._stepped(held.levels, old, count)
        return Stairs(owned(first), levels, owned(cut(newest, count * self.block)))

    def attend(self, q: Tensor, held: Stairs, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Codes of each level and exact tokens, merged into one softmax."""
        exact = joined(held.first, held.newest, (k, v))
        causal = q.shape[2] > 1
        levels = zip(self.bits[1:], held.levels, strict=True)
        coded = [(bits, level) for bits, level in levels if level is not None]
        if not coded:
            return ops.attend(q, *exact, causal=causal, **options)
        parts = []
        for bits, (k_codes, v_codes) in coded:
            widths: dict[str, Any] = {"k_bits": bits, "v_bits": bits, **options}
            if bits == coded[-1][0]:
                widths |= {"exact": exact, "causal": causal}
            parts.append(ops.attend_quantized(q, k_codes, v_codes, return_lse=True, **widths))
        return parts[0][0] if len(parts) == 1 else ops.merge(parts)[0]

    def tensors(self, held: Stairs) -> list[Tensor]:
        """Exact tokens, codes, scales and zeros."""
        coded = [level for level in held.levels if level is not None]
        return [*held.first, *held.newest, *(x for k, v in coded for x in (*k, *v))]

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
        """Exact tokens, and codes, scales and zeros of the others."""
        blocks = max(0, seen - self.first - self.recent) // self.block
        blocks = blocks if len(self.bits) > 1 else 0
        steps = (self.bits[1:-1] + self.bits[-1:] * blocks)[:blocks]
        each = sum(ops.quantized_bytes(dim, n, group=self.group) for n in steps) * self.block
        return 2.0 * kv_heads * (each + (seen - blocks * self.block) * dim * itemsize)

    def _stepped(
        self, levels: tuple[Coded | None, ...], new: Tokens, count: int
    ) -> tuple[Coded | None, ...]:
        """Levels after `count` blocks more: every block goes down through all on its way."""
        last = len(levels) - 1
        steps: list[Coded | None] = [None] * last
        down = [level for level in levels[last:] if level is not None]
        for at in range(last - 1, -1, -1):
            if (block := levels[at]) is not None:
                moved = self._lowered(self._read(block, at), at + 1, min(at + count, last))
                if at + count < last:
                    steps[at + count] = moved
                else:
                    down.append(moved)
        # Of the new blocks the oldest go to the end, the others to a level each.
        if (far := count - last) > 0:
            down.append(self._lowered(cut(new, 0, far * self.block), 0, last))
        for age in range(min(count, last)):
            start = (count - 1 - age) * self.block
            steps[age] = self._lowered(cut(new, start, start + self.block), 0, age)
        return (*steps, _chained(down))

    def _lowered(self, tokens: Tokens, start: int, stop: int) -> Coded:
        """Tokens quantised for the levels start … stop, one after the other."""
        for at in range(start, stop + 1):
            bits = self.bits[at + 1]
            # The four levels that fit normal numbers best end at 1.5 deviations; the largest of 32
            # such numbers lies at 2.1.
            clip = self.clip or (0.7 if bits == 2 else 1.0)
            coded = (
                ops.quantize(tokens[0], bits, group=self.key_tile, clip=clip),
                ops.quantize(tokens[1], bits, group=self.group, clip=clip),
            )
            tokens = self._read(coded, at)
        return coded

    def _read(self, coded: Coded, at: int) -> Tokens:
        """Values of the codes of a level."""
        bits = self.bits[at + 1]
        groups = self.key_tile, (1, self.group)
        k, v = (
            ops.dequantize(x, bits, group=group) for x, group in zip(coded, groups, strict=True)
        )
        return k, v


def _chained(parts: list[Coded]) -> Coded | None:
    """Codes of consecutive tokens as one."""
    if len(parts) < 2:
        return parts[0] if parts else None
    k, v = (
        Quantized(*(torch.cat(tensors, 2) for tensors in zip(*pieces, strict=True)))
        for pieces in zip(*parts, strict=True)
    )
    return k, v
