"""What a cache that drops tokens holds: a segment for every kv head of every row, no padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slots:
    """Segments of different lengths, one behind the other.

    held: "k" (T, D), "v" (T, Dv), and what a policy notes of every slot (T,); lengths: slots of
    each segment, row by row and kv head by kv head, T in all. Slots are in the tokens' order.
    """

    held: dict[str, Tensor]
    lengths: list[int]

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

    def padded(self, name: str) -> Tensor:
        """What is held under a name as (S, width, …): short segments are filled up in front."""
        x = self.held[name]
        full = (len(self.lengths), self.width, *x.shape[1:])
        if self.even:
            return x.view(full)
        out = x.new_zeros(full)
        out[self.filled()] = x
        return out

    def keep(self, kept: Tensor) -> Slots:
        """The slots marked in kept (S, width) bool."""
        kept = kept & self.filled()
        flat = kept[self.filled()]
        return Slots({n: x[flat] for n, x in self.held.items()}, kept.sum(1).tolist())

    def append(self, new: Mapping[str, Tensor]) -> Slots:
        """Every segment followed by its part of new tensors (S, l, …)."""
        count = next(iter(new.values())).shape[1]
        held = {}
        for name, x in self.held.items():
            pairs = zip(x.split(self.lengths), new[name].unbind(0), strict=True)
            held[name] = torch.cat([piece for pair in pairs for piece in pair])
        return Slots(held, [n + count for n in self.lengths])

    def rows(self, count: int) -> list[Slots]:
        """The segments of each of `count` rows, as views."""
        heads = len(self.lengths) // count
        lengths = [self.lengths[i : i + heads] for i in range(0, len(self.lengths), heads)]
        sizes = [sum(row) for row in lengths]
        pieces = {name: x.split(sizes) for name, x in self.held.items()}
        return [Slots({n: x[b] for n, x in pieces.items()}, lengths[b]) for b in range(count)]

    @staticmethod
    def joined(parts: Sequence[Slots]) -> Slots:
        """Rows one behind the other, copied."""
        held = {name: torch.cat([part.held[name] for part in parts]) for name in parts[0].held}
        return Slots(held, [n for part in parts for n in part.lengths])
