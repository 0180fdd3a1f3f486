"""How bases of keys and values are trained, and a search for the coordinates each head needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.attention._trained import Learner, ModelShape, Told
from foveate.attention.base import Call
from foveate.cache._axes import PARTS, Axes, rank

STEP = 2
"""Parts by which the search lowers a rank, and below which it lowers none."""

# Share of all ranks that are lowered in one round of the search.
_SHARE = 0.75


class Bases(Learner):
    """Bases of the keys and values of all layers: principal axes of the texts, then turned.

    Every pass keeps a number of coordinates drawn anew for each layer, head, keys and values, so
    that the leading ones learn to do without the others. The loss is the model's own and, to a
    quarter, the divergence from its predictions with everything kept. With a `goal`, the share of
    coordinates to keep, training ends with a search for what each head can do without.
    """

    through_model: ClassVar[bool] = True
    distil: ClassVar[float] = 0.25

    def __init__(self, shape: ModelShape, goal: float | None) -> None:
        super().__init__()
        size = (2, shape.layers, shape.kv_heads, shape.dim)
        self.goal = goal
        self.start = torch.eye(shape.dim).expand(*size, -1).clone()
        self.turn = nn.Parameter(torch.zeros(*size, shape.dim))
        self.mean = nn.Parameter(torch.zeros(size))
        self.sums: dict[int, Tensor] = {}
        self.watching = True
        self.parts: Tensor | None = None
        self.order: Tensor | None = None
        self.noise = torch.Generator().manual_seed(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention to keys and values as far as their kept coordinates tell."""
        if self.watching:
            points = torch.stack((k, v)).transpose(1, 2).flatten(2, 3)
            self.sums[call.layer] = ops.moments(points) + self.sums.get(call.layer, 0)
        else:
            k, v = (self._kept(x, kind, call.layer) for kind, x in enumerate((k, v)))
        return ops.attend(q, k, v, **call.options())

    @torch.no_grad()
    def watched(self) -> None:
        """Take the principal axes of the keys and values that were seen."""
        for layer, sums in self.sums.items():
            self.mean[:, layer], self.start[:, layer] = ops.principal_axes(sums)
        self.watching = False

    def bases(self, at: slice | tuple[int, int] = slice(None)) -> Tensor:
        """Orthogonal matrices (…, D, D) of all keys and values, or of those at (kind, layer)."""
        return self.start[at].to(self.turn.device) @ ops.cayley(self.turn[at])

    def _kept(self, x: Tensor, kind: int, layer: int) -> Tensor:
        """Keys or values x (B, Hkv, n, D) without the coordinates that are dropped."""
        axes, (heads, dim) = Axes(self.bases((kind, layer)), self.mean[kind, layer]), x.shape[1::2]
        if self.parts is None:
            parts = torch.randint(1, PARTS + 1, (heads,), generator=self.noise)
        else:
            parts = self.parts[kind, layer]
        ranks = torch.tensor([rank(n, dim) for n in parts.tolist()])
        kept = torch.arange(dim) < ranks[:, None, None]
        return axes.restored(axes.coordinates(x) * kept.to(x.device))

    def loss(self, done: float, text: Tensor | None, task: int) -> Tensor:
        """The model's."""
        if text is None:
            raise ValueError("bases are trained through the model, but got no loss of it")
        return text

    def finish(self, hidden: Callable[[], Tensor], told: Told) -> None:
        """Search for the order in which ranks are lowered."""
        if self.goal is not None:

            def under(parts: Tensor) -> Tensor:
                self.parts = parts
                return hidden()

            self.order = lowering(under, tuple(self.mean.shape[:3]), self.goal, told)

    def weights(self) -> dict[str, Tensor]:
        """Bases and means, and the order of a search."""
        held = {"basis": self.bases().detach(), "mean": self.mean.detach()}
        return held if self.order is None else held | {"order": self.order}


def lowering(
    hidden: Callable[[Tensor], Tensor], size: tuple[int, ...], goal: float, told: Told
) -> Tensor:
    """The order (n,), indices into `size`, in which ranks are lowered until `goal` is reached.

    hidden(parts) are a model's last hidden states h under ranks of such parts. In every round each
    rank is lowered alone; those that move the hidden states least, by ‖h − h'‖ / ‖h‖, are then
    lowered together.
    """
    parts = torch.full(size, PARTS)
    flat = parts.view(-1)
    wanted, order = _steps(goal, flat.numel()), list[int]()
    while len(order) < wanted:
        before, moved = hidden(parts), dict[int, float]()
        can = (flat > STEP).nonzero().flatten().tolist()
        stage = f"lowering ranks from {float(flat.sum()) / (PARTS * len(flat)):.0%}"
        for done, i in enumerate(can):
            flat[i] -= STEP
            moved[i] = float((hidden(parts) - before).norm() / before.norm())
            flat[i] += STEP
            told(stage, done + 1, len(can))
        count = min(max(1, int(_SHARE * len(flat))), wanted - len(order))
        least = sorted(can, key=moved.__getitem__)[:count]
        flat[least] -= STEP
        order += least
    return torch.tensor(order, dtype=torch.int32)


def parts_after(order: Tensor, size: tuple[int, ...], goal: float) -> Tensor:
    """Parts (`size`) of the ranks at which a search reaches `goal`.

    Raises ValueError when it did not go so far.
    """
    count = math.prod(size)
    if (steps := _steps(goal, count)) > len(order):
        reached = 1 - len(order) * STEP / PARTS / count
        raise ValueError(f"ranks were searched down to rate {reached:.3g}, not to {goal}")
    lowered = torch.bincount(order[:steps].long(), minlength=count)
    return (PARTS - STEP * lowered).view(size)


def _steps(goal: float, count: int) -> int:
    """Steps after which `count` ranks hold the share `goal` on average, or less."""
    return math.ceil(round((1 - goal) * count * PARTS / STEP, 6))
