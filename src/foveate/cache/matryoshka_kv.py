"""MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection (2024, paper 102)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from foveate import ops
from foveate.attention._trained import Learner, ModelShape, Trainable, Trained
from foveate.cache._axes import PARTS, Axes, Group, rank, trained_groups
from foveate.cache._bases import STEP, Bases, parts_after
from foveate.cache._tokens import Tokens, cut, joined, owned
from foveate.cache.base import Store
from foveate.registry import Card, register


class Held(NamedTuple):
    """What is held of one row: coordinates of its tokens, group by group, and the newest."""

    groups: tuple[Group, ...]
    parts: tuple[Tokens, ...]
    newest: Tokens


@register(
    Card(
        name="matryoshka_kv",
        title="MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection",
        claim="along trained orthogonal axes the leading coordinates of keys and values suffice",
        kind="cache",
        family="decode",
        year=2024,
        paper=102,
        cost="2·rate·D numbers a token and kv head, of which attention reads no more",
        decoding="queries are projected and outputs turned back; nothing of full width is made",
        confidence="operator, sampling and search checked against the released code; training "
        "turns the principal axes, where the paper starts from their inverse Cayley image; axes "
        "of a row's own first tokens are an addition, as are exact newest ones (none at block 1)",
        small={"rate": 0.5, "calibrate": 24, "block": 8},
        full={"rate": 1.0},
    )
)
@dataclass(frozen=True, kw_only=True)
class MatryoshkaKV(Trainable, Store):
    """The leading coordinates of keys and values along axes of their layer and kv head.

    `rate` is the share of coordinates held. With ranks "even" every head holds as many, in eighths
    of the head dim; with "searched" as many as the search after training found it to need, in
    quarters. The newest tokens are held as they are until there are `block` of them. `basis` names
    the file of bases that `foveate train` writes, one for every rate. Without it a row holds its
    first `calibrate` tokens as they are, and from then on coordinates along their principal axes;
    these count as part of what it holds.
    """

    trained: ClassVar[str] = "basis"
    calibrates: ClassVar[bool] = True

    rate: float = 0.5
    ranks: Literal["even", "searched"] = "even"
    block: int = 64
    calibrate: int = 256
    basis: str = ""

    def __post_init__(self) -> None:
        for name in ("block", "calibrate"):
            ops.check_block(name, getattr(self, name))
        if self.ranks not in ("even", "searched"):
            raise ValueError(f"ranks must be even or searched, got {self.ranks!r}")
        least = (1 if self.ranks == "even" else STEP) / PARTS
        if not least <= self.rate <= 1:
            raise ValueError(
                f"rate must be from {least} to 1 with {self.ranks} ranks, got {self.rate}"
            )
        if (found := self.read()) is not None:
            _check_weights(found)
            self._parts(found)

    def empty(self, k: Tensor, v: Tensor, *, layer: int) -> Held:
        """Nothing held, of keys and values like k and v (1, Hkv, n, ·)."""
        none = cut((k, v), 0, 0)
        if (found := self.read()) is not None:
            found.check_model(found.shape._replace(kv_heads=k.shape[1], dim=k.shape[3]))
            parts = tuple(zip(*self._parts(found)[:, layer].tolist(), strict=True))
            groups = trained_groups(found, parts, layer, k.device)
            return Held(groups, tuple(group.encoded(*none) for group in groups), none)
        if self.ranks == "searched":
            raise ValueError("searched ranks are kept with trained bases: give basis=FILE")
        return Held((), (), none)

    def extended(self, held: Held, k: Tensor, v: Tensor) -> Held:
        """What is held once the tokens k, v (1, Hkv, n, ·) have come, too."""
        groups, parts, newest = held
        newest = joined(newest, (k, v))
        count = newest[0].shape[2]
        if not groups and count < self.calibrate:
            return Held((), (), newest)
        if not groups:
            groups = (self._principal(*newest),)
            parts = (groups[0].encoded(*cut(newest, 0, 0)),)
        if full := count - count % self.block:
            old = cut(newest, 0, full)
            pairs = zip(parts, groups, strict=True)
            parts = tuple(joined(part, group.encoded(*old)) for part, group in pairs)
        return Held(groups, parts, owned(cut(newest, full)))

    def attend(self, q: Tensor, held: Held, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """The newest tokens and those of the call as they are, merged with coordinates."""
        k, v = joined(held.newest, (k, v))
        own = ops.attend(q, k, v, causal=q.shape[2] > 1, return_lse=True, **options)
        if not held.groups:
            return own[0]
        out, lse = torch.empty_like(own[0]), torch.empty_like(own[1])
        shared = q.shape[1] // k.shape[1]
        for group, part in zip(held.groups, held.parts, strict=True):
            rows = [h * shared + i for h in group.heads for i in range(shared)]
            out[:, rows], lse[:, rows] = group.read(q[:, rows], *part, **options)
        return ops.merge([own, (out, lse)])[0]

    def tensors(self, held: Held) -> list[Tensor]:
        """Coordinates, newest tokens, and the axes that are the row's own."""
        own = () if self.basis else held.groups
        axes = [x for group in own for x in (*group.k, *group.v)]
        return [*axes, *(x for part in (*held.parts, held.newest) for x in part)]

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
        """Newest tokens, coordinates of the others (mean over layers), axes of the row's own."""
        found, axes = self.read(), 0
        if found is not None:
            ranks = [rank(n, dim) for n in self._parts(found).flatten().tolist()]
            width = sum(ranks) / len(ranks)
        else:
            width = rank(self._even, dim)
            axes = 4 * dim * (width + 1) if seen >= self.calibrate else 0
        coded = seen - seen % self.block if found is not None or axes else 0
        return 2.0 * kv_heads * ((coded * width + (seen - coded) * dim) * itemsize + axes)

    def learner(self, shape: ModelShape) -> Learner:
        """Bases that wait to see texts."""
        return Bases(shape, self.rate if self.ranks == "searched" else None)

    def _principal(self, k: Tensor, v: Tensor) -> Group:
        """All heads, with the principal axes of their tokens."""
        axes = (
            Axes.leading(*ops.principal_axes(ops.moments(x[0])), rank(self._even, x.shape[3]))
            for x in (k, v)
        )
        return Group(list(range(k.shape[1])), *axes)

    @property
    def _even(self) -> int:
        """Parts of the head dim held where all heads hold as many."""
        return max(1, round(PARTS * self.rate))

    def _parts(self, found: Trained) -> Tensor:
        """Parts of the head dim held, (2, layers, kv_heads)."""
        size = (2, found.shape.layers, found.shape.kv_heads)
        if self.ranks == "even":
            return torch.full(size, self._even)
        try:
            return parts_after(found.weights.get("order", torch.zeros(0)), size, self.rate)
        except ValueError as error:
            raise ValueError(f"{found.path}: {error}; train with ranks=searched") from error


def _check_weights(found: Trained) -> None:
    """Refuse a file that holds no orthogonal bases for its model."""
    dim = found.shape.dim
    size = (2, found.shape.layers, found.shape.kv_heads, dim)
    order = found.weights.get("order")
    searched = {} if order is None else {"order": tuple(order.shape)}
    found.check_tensors("bases", basis=(*size, dim), mean=size, **searched)
    basis = found.weights["basis"]
    away = float((basis.mT @ basis - torch.eye(dim)).abs().max())
    if not away < 1e-3:
        raise ValueError(f"{found.path} holds bases that are not orthogonal: off by {away:.1e}")
