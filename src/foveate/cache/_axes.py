"""Keys and values as coordinates along the leading axes of bases, and attention over these."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from foveate import ops
from foveate.attention._trained import Trained
from foveate.cache._tokens import Tokens
from foveate.ops.tile import default_scale

PARTS = 8
"""Ranks are counted in this many parts of the head dim."""


def rank(parts: int, dim: int) -> int:
    """Coordinates that so many of the PARTS of a head dim are."""
    return -(-dim * parts // PARTS)


class Axes(NamedTuple):
    """The leading axes of some kv heads: orthonormal columns (h, D, r) around a mean (h, D).

    Turning there and back is done in float64, so that it loses nothing beside the dropped axes.
    """

    basis: Tensor
    mean: Tensor

    @classmethod
    def leading(cls, mean: Tensor, basis: Tensor, coordinates: int) -> Axes:
        """The first of all axes (h, D, D), copied."""
        return cls(basis[..., :coordinates].float().contiguous(), mean.float())

    def coordinates(self, x: Tensor, *, centred: bool = True) -> Tensor:
        """Of x (B, h·g, n, D), g heads to each of the h: (B, h·g, n, r), in the dtype of x."""
        wide = x.double().unflatten(1, (len(self.basis), -1))
        wide = wide - self.mean[:, None, None] if centred else wide
        return (wide @ self.basis[:, None].double()).flatten(1, 2).to(x.dtype)

    def restored(self, coordinates: Tensor) -> Tensor:
        """The points (B, h·g, n, D) with such coordinates (B, h·g, n, r)."""
        wide = coordinates.double().unflatten(1, (len(self.basis), -1))
        back = wide @ self.basis.mT[:, None].double() + self.mean[:, None, None]
        return back.flatten(1, 2).to(coordinates.dtype)


class Group(NamedTuple):
    """Some kv heads of a layer, all of one rank, with the axes of their keys and values."""

    heads: list[int]
    k: Axes
    v: Axes

    def encoded(self, k: Tensor, v: Tensor) -> Tokens:
        """Coordinates of tokens k, v (1, Hkv, n, ·) in the group's heads."""
        return self.k.coordinates(k[:, self.heads]), self.v.coordinates(v[:, self.heads])

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, softcap: float | None
    ) -> Tokens:
        """Attention (out, lse) of the queries of the group's heads over all coordinates k, v."""
        scale = default_scale(scale, q.shape[3])
        shift: float | Tensor = 0.0
        if softcap is None:
            # The mean of the keys adds the same to all logits of a query: it moves the lse alone.
            # It may be large, and an error in an lse is one of weights: float64.
            mean = self.k.mean.repeat_interleave(q.shape[1] // len(self.heads), 0)
            shift = scale * (q.double() @ mean.double()[..., None]).squeeze(-1)
            q = self.k.coordinates(q, centred=False)
        else:  # a capped logit is no sum of two: it needs the keys whole
            k = self.k.restored(k)
        out, lse = ops.attend(q, k, v, scale=scale, softcap=softcap, return_lse=True)
        return self.v.restored(out), (lse + shift).to(lse.dtype)


@lru_cache(maxsize=256)
def trained_groups(
    found: Trained, parts: tuple[Sequence[int], ...], layer: int, device: torch.device
) -> tuple[Group, ...]:
    """The kv heads of a layer by the parts (keys, values) that each holds; made once."""
    groups = []
    for pair in dict.fromkeys(parts):
        heads = [h for h, own in enumerate(parts) if own == pair]
        k, v = (
            Axes.leading(
                found.weights["mean"][kind, layer, heads].to(device),
                found.weights["basis"][kind, layer, heads].to(device),
                rank(pair[kind], found.shape.dim),
            )
            for kind in (0, 1)
        )
        groups.append(Group(heads, k, v))
    return tuple(groups)
