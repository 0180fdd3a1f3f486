"""How scores become weights: the streaming protocol and its first three members."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Stats = dict[str, Tensor]


@dataclass(frozen=True)
class Normalizer:
    """Turns scores of a query row into weights, one block of keys at a time.

    A walk over the key blocks calls `update(stats, scores, visible)` and then `weight(scores,
    stats)`. Scores of invisible pairs are -inf and their weights are zeroed by the walk; a `weight`
    whose gradient is not finite at -inf must replace them itself. With `passes` 2 all updates come
    before the first weight. `update` returns the new statistics and the factor by which what was
    accumulated so far must shrink. `finish(acc, stats)` ends a row; `merge` joins two halves.
    Statistics are float32 or wider, shaped (…, rows, 1).
    """

    passes: ClassVar[int] = 1

    def init(self, like: Tensor) -> Stats:
        """Statistics before any key; `like` (…, rows, 1) gives shape, dtype and device."""
        return {}

    def update(self, stats: Stats, scores: Tensor, visible: Tensor) -> tuple[Stats, Tensor | None]:
        """Take in a block of scores (…, rows, keys)."""
        return stats, None

    def weight(self, scores: Tensor, stats: Stats) -> Tensor:
        """Weights (unfinished) of a block of scores."""
        raise NotImplementedError

    def finish(self, acc: Tensor, stats: Stats) -> Tensor:
        """Outputs from accumulated weighted values (…, rows, Dv)."""
        return acc

    def lse(self, stats: Stats) -> Tensor:
        """Log-sum-exp of the row (…, rows); only where the normaliser has one."""
        raise ValueError(
            f"{type(self).__name__.lower()} has no log-sum-exp: return_lse must be off"
        )

    def merge(self, a: tuple[Tensor, Stats], b: tuple[Tensor, Stats]) -> tuple[Tensor, Stats]:
        """Join the accumulations of two disjoint sets of keys."""
        return a[0] + b[0], a[1]


@dataclass(frozen=True)
class Softmax(Normalizer):
    """Weights exp(s) / Σ exp(s), kept safe by a running maximum."""

    def init(self, like: Tensor) -> Stats:
        """Running maximum and sum."""
        return {"max": torch.full_like(like, -math.inf), "sum": torch.zeros_like(like)}

    def update(self, stats: Stats, scores: Tensor, visible: Tensor) -> tuple[Stats, Tensor | None]:
        """Raise the maximum, rescale the sum."""
        new = torch.maximum(stats["max"], scores.detach().amax(-1, keepdim=True))
        safe = new.masked_fill(torch.isinf(new), 0)
        shrink = torch.exp(stats["max"] - safe)
        total = stats["sum"] * shrink + torch.exp(scores - safe).sum(-1, keepdim=True)
        return {"max": new, "sum": total}, shrink

    def weight(self, scores: Tensor, stats: Stats) -> Tensor:
        """exp(s - running maximum)."""
        return torch.exp(scores - stats["max"].masked_fill(torch.isinf(stats["max"]), 0))

    def finish(self, acc: Tensor, stats: Stats) -> Tensor:
        """Divide by the sum; rows without keys stay 0."""
        return acc / stats["sum"].masked_fill(stats["sum"] == 0, 1)

    def lse(self, stats: Stats) -> Tensor:
        """Maximum plus log of the sum."""
        empty = stats["sum"] == 0  # log(0) is right forward and NaN backward
        lse = stats["max"] + stats["sum"].masked_fill(empty, 1).log()
        return lse.masked_fill(empty, -math.inf).squeeze(-1)

    def merge(self, a: tuple[Tensor, Stats], b: tuple[Tensor, Stats]) -> tuple[Tensor, Stats]:
        """Bring both halves to the common maximum and add."""
        top = torch.maximum(a[1]["max"], b[1]["max"])
        safe = top.masked_fill(torch.isinf(top), 0)
        fa, fb = (torch.exp(x[1]["max"] - safe) for x in (a, b))
        total = fa * a[1]["sum"] + fb * b[1]["sum"]
        return fa * a[0] + fb * b[0], {"max": top, "sum": total}


@dataclass(frozen=True)
class Sigmoid(Normalizer):
    """Weights σ(s + bias), each pair on its own; bias -log(length) keeps the sum near 1."""

    bias: float = 0.0

    def weight(self, scores: Tensor, stats: Stats) -> Tensor:
        """Logistic of the biased score."""
        return torch.sigmoid(scores + self.bias)


@dataclass(frozen=True)
class Relu(Normalizer):
    """Weights relu(s)^power; with `mean` they are divided by the number of visible keys."""

    power: int = 1
    mean: bool = False

    def init(self, like: Tensor) -> Stats:
        """Number of visible keys so far."""
        return {"count": torch.zeros_like(like)}

    def update(self, stats: Stats, scores: Tensor, visible: Tensor) -> tuple[Stats, Tensor | None]:
        """Count visible keys."""
        return {"count": stats["count"] + visible.sum(-1, keepdim=True)}, None

    def weight(self, scores: Tensor, stats: Stats) -> Tensor:
        """Powered positive part."""
        return torch.relu(scores) ** self.power

    def finish(self, acc: Tensor, stats: Stats) -> Tensor:
        """Divide by the count when asked."""
        return acc / stats["count"].clamp_min(1) if self.mean else acc

    def merge(self, a: tuple[Tensor, Stats], b: tuple[Tensor, Stats]) -> tuple[Tensor, Stats]:
        """Add outputs and counts."""
        return a[0] + b[0], {"count": a[1]["count"] + b[1]["count"]}


NORMALIZERS: dict[str, Normalizer] = {
    "softmax": Softmax(),
    "sigmoid": Sigmoid(),
    "relu": Relu(),
}


def normalizer_of(normalizer: str | Normalizer) -> Normalizer:
    """A normaliser by name or as given; ValueError names the known ones."""
    if isinstance(normalizer, Normalizer):
        return normalizer
    if normalizer not in NORMALIZERS:
        raise ValueError(f"unknown normalizer {normalizer!r}; known: {', '.join(NORMALIZERS)}")
    return NORMALIZERS[normalizer]
