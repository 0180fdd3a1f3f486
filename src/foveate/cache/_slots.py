"""What a cache that drops tokens holds: a segment for every kv head of every row, no padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Join = Callable[[str, Tensor, Tensor], Tensor]
"""Puts new slots (S, l, …) behind those held (S, n, …) under a name."""


def _copied(name: str, held: Tensor, new: Tensor) -> Tensor:
    return torch.cat([held, new], 1)


@dataclass(frozen=True, eq=False)
class Slots:
    """Segments of S kv heads; slots are in the tokens' order.

    held: "k" (S, n, D), "v" (S, n, Dv), and what a policy notes of every slot (S, n); where the
    segments are not equally long, they lie one behind the other: (T, …). lengths: slots of each
    segment, row by row and kv head by kv head, T in all.
    """

    held: dict[str, Tensor]
    lengths: list[int]

    @staticmethod
    def of(flat: Mapping[str, Tensor], lengths: list[int]) -> Slots:
        """Segments that lie one behind the other in flat tensors (T, …)."""
        slots = Slots(dict(flat), lengths)
        if slots.even:
            shape = len(lengths), slots.width
            slots.held.update({n: x.reshape(*shape, *x.shape[1:]) for n, x in flat.items()})
        return slots

    @property
    def width(self) -> int:
        """Length of the longest segment."""
        return max(self.lengths, default=0)

    @property
    def even(self) -> bool:
        """Whether all segments are equally long."""
        return min(self.lengths, default=0) == self.width

    def filled(self) -> Tensor:
        """Which slots of `padded` are real, (S, width) bool."""
        device = self.held["k"].device
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(self.width, device=device) >= self.width - lengths[:, None]

    def flat(self, name: str) -> Tensor:
        """What is held under a name as (T, …)."""
        return self.held[name].flatten(0, 1) if self.even else self.held[name]

    def padded(self, name: str) -> Tensor:
        """What is held under a name as (S, width, …): short segments are filled up in front."""
        x = self.held[name]
        if self.even:
            return x
        out = x.new_zeros(len(self.lengths), self.width, *x.shape[1:])
        out[self.filled()] = x
        return out

    def replaced(self, flat: Mapping[str, Tensor]) -> Slots:
        """The same slots with other tensors (T, …) under some names."""
        return Slots(self.held | Slots.of(flat, self.lengths).held, self.lengths)

    def keep(self, kept: Tensor) -> Slots:
        """The slots marked in kept (S, width) bool."""
        kept = kept & self.filled()
        at = kept if self.even else kept[self.filled()]
        return Slots.of({n: x[at] for n, x in self.held.items()}, kept.sum(1).tolist())

    def append(self, new: Mapping[str, Tensor], join: Join = _copied) -> Slots:
        """Every segment followed by its part of new tensors (S, l, …)."""
        count = next(iter(new.values())).shape[1]
        lengths = [n + count for n in self.lengths]
        if self.even:
            return Slots({n: join(n, x, new[n]) for n, x in self.held.items()}, lengths)
        held = {}
        for name, x in self.held.items():
            pairs = zip(x.split(self.lengths), new[name].unbind(0), strict=True)
            held[name] = torch.cat([piece for pair in pairs for piece in pair])
        return Slots(held, lengths)

    def rows(self, count: int) -> list[Slots]:
        """The segments of each of `count` rows, as views."""
        heads = len(self.lengths) // count
        lengths = [self.lengths[i : i + heads] for i in range(0, len(self.lengths), heads)]
        sizes = [heads if self.even else sum(row) for row in lengths]
        pieces = {name: x.split(sizes) for name, x in self.held.items()}
        make = Slots if self.even else Slots.of
        return [make({n: x[b] for n, x in pieces.items()}, lengths[b]) for b in range(count)]

    @staticmethod
    def joined(parts: Sequence[Slots]) -> Slots:
        """Rows one behind the other, copied."""
        held = {name: torch.cat([part.flat(name) for part in parts]) for name in parts[0].held}
        return Slots.of(held, [n for part in parts for n in part.lengths])
