"""Layers in a row after a pattern: `"gated_deltanet*3, dense"` is a hybrid in one string."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate import ops
from foveate.attention.base import Attention
from foveate.nn._attending import Attending
from foveate.nn._linear import ShortConv
from foveate.nn._recurrent import back_in_place, real_first
from foveate.ops import Mask
from foveate.registry import create, parse

MLP = "mlp"
"""In a pattern: a sublayer that is an MLP alone."""


@dataclass(frozen=True)
class StackState:
    """What decoding keeps: the state of every layer, and that of the convolution before it."""

    layers: tuple[Any, ...]
    convs: tuple[Tensor | None, ...]
    pos: int


def pattern_items(pattern: str) -> list[str]:
    """Layers of a pattern, one name with its options each: "a*2, b:x=1,y=2" -> a, a, b:x=1,y=2.

    Raises ValueError for an empty pattern and for a count that is no number above 0.
    """
    items: list[str] = []
    for piece in (p.strip() for p in pattern.split(",")):
        if items and re.match(r"^\w+\s*=", piece):  # an option of the item before
            items[-1] += f",{piece}"
        elif piece:
            items.append(piece)
    layers = []
    for item in items:
        name, star, count = item.partition("*")
        if star and (not count.strip().isdecimal() or int(count) < 1):
            raise ValueError(f"{item!r} in a pattern must read layer*count, count 1 or more")
        layers += [name.strip()] * (int(count) if star else 1)
    if not layers:
        raise ValueError("a pattern must name at least one layer")
    return layers


def gated_width(dim: int) -> int:
    """The usual inner width of a gated MLP: 8/3 dim, rounded up to a multiple of 8."""
    return -(-8 * dim // 24) * 8


class SwiGLU(nn.Module):
    """x -> (silu(x W_gate) ⊙ x W_up) W_down with `width` inner channels."""

    def __init__(self, dim: int, width: int, **made: Any) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(dim, width, bias=False, **made) for _ in range(2))
        self.down = nn.Linear(width, dim, bias=False, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, dim) -> (…, dim)."""
        y: Tensor = self.down(silu(self.gate(x)) * self.up(x))
        return y


class Block(nn.Module):
    """x + layer(norm(x)), then x + mlp(norm(x)); either may be missing.

    `conv` > 0 puts a causal convolution of so many tokens between the norm and the layer.
    """

    def __init__(
        self, layer: nn.Module | None, dim: int, *, mlp: int = 0, conv: int = 0, **made: Any
    ) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.RMSNorm(dim, **made) if layer is not None else None
        self.conv = ShortConv(dim, conv, activation=False, **made) if conv else None
        if self.conv is not None:
            with torch.no_grad():  # it starts near the identity
                self.conv.weight[:, -1] += 1
        self.mlp_norm = nn.RMSNorm(dim, **made) if mlp else None
        self.mlp = SwiGLU(dim, mlp, **made) if mlp else None

    def forward(self, x: Tensor, conv: Tensor | None, **call: Any) -> tuple[Tensor, Any, Any]:
        """x (B, L, dim) -> y, the layer's state where `return_state`, the convolution's state."""
        state = None
        if self.layer is not None and self.norm is not None:
            y = self.norm(x)
            if self.conv is not None:
                y, conv = self._convolved(self.conv, y, conv, call["mask"])
            y = self.layer(y, **call)
            if call.get("return_state"):
                y, state = y
            x = x + y
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state, conv

    @staticmethod
    def _convolved(
        conv: ShortConv, x: Tensor, state: Tensor | None, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        """x after the convolution, to which tokens that a mask hides are as if not there."""
        valid = ops.real_tokens(mask, x.shape[0], x.shape[1])
        if valid is None:
            out: tuple[Tensor, Tensor] = conv(x, state=state)
            return out
        packed, first, order = real_first(x, valid)
        y, after = conv(packed, first, state)
        return back_in_place(y, valid, order), after


class Stack(nn.Module):
    """Residual layers x (B, L, dim) -> (B, L, dim) after a pattern.

    An item of `pattern` is a layer (`gated_deltanet`, `gla:expand_v=2`), an attention mechanism
    (`dense`, `sink_window:window=64`), or `mlp`; `*n` repeats it, and the pattern is repeated until
    there are `layers` (None: once). Layers that take them get `heads`, rotation `theta`, their
    index and the number of layers. `mlp` is the inner width of the MLP after each layer (0: none),
    `conv` the width of a causal convolution before it. Layers of one class that share something
    (a classmethod `tie`) are tied. Raises ValueError for an unknown layer and for sizes that do
    not fit.
    """

    def __init__(
        self,
        dim: int,
        pattern: str,
        *,
        heads: int = 4,
        layers: int | None = None,
        mlp: int = 0,
        conv: int = 0,
        theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ops.check_block("dim", dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        items = pattern_items(pattern)
        count = len(items) if layers is None else ops.check_block("layers", layers)
        self.items = [items[i % len(items)] for i in range(count)]
        given = {"heads": heads, "theta": theta, "layers": count, **made}
        self.blocks = nn.ModuleList(
            Block(None, dim, mlp=mlp or 4 * dim, **made)
            if item == MLP
            else Block(_layer(item, dim, {**given, "index": i}), dim, mlp=mlp, conv=conv, **made)
            for i, item in enumerate(self.items)
        )
        self.norm = nn.RMSNorm(dim, **made)
        _tie([block.layer for block in self.blocks if isinstance(block, Block)])

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = True,
        mask: Mask | None = None,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """x (B, L, dim) -> y (B, L, dim), with `return_state` (y, state); after the last norm."""
        if state is not None and not return_state:
            raise ValueError("a stack that goes on from a state gives one back: return_state=True")
        if state is not None and len(state.layers) != len(self.blocks):
            raise ValueError(
                f"got the state of {len(state.layers)} layers for a stack of {len(self.blocks)}"
            )
        kept, convs = [], []
        empty = (None,) * len(self.blocks)
        held = StackState(empty, empty, 0) if state is None else state
        for block, own, before in zip(self.blocks, held.layers, held.convs, strict=True):
            call: dict[str, Any] = {"causal": causal, "mask": mask}
            if return_state:
                call |= {"state": own, "return_state": True}
            x, after, conv = block(x, before, **call)
            kept.append(after)
            convs.append(conv)
        y: Tensor = self.norm(x)
        if not return_state:
            return y
        return y, StackState(tuple(kept), tuple(convs), held.pos + x.shape[1])

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token x (B, dim) after those of the state: y (B, dim) and the state after it."""
        y, state = self.forward(x[:, None], state=state, return_state=True)
        return y[:, 0], state


def _layer(item: str, dim: int, given: dict[str, Any]) -> nn.Module:
    """The layer that an item of a pattern names, with what it takes of what is given."""
    cls, options = parse(item)
    kind = cls.card.kind
    if kind == "attention":
        mechanism: Attention = cls(**options)
        return Attending(mechanism, dim, **given)
    if kind != "module":
        raise ValueError(f"{cls.card.name} is no layer but a mechanism of kind {kind!r}")
    taken = inspect.signature(cls).parameters
    given = {key: value for key, value in given.items() if key in taken}
    layer: nn.Module = create(cls.card.name, **{"dim": dim, **given} | options)
    return layer


def _tie(layers: Sequence[nn.Module | None]) -> None:
    """Let layers of one class share what they share."""
    groups: dict[Any, list[Any]] = {}
    for layer in layers:
        if hasattr(layer, "tie"):
            groups.setdefault(type(layer), []).append(layer)
    for cls, members in groups.items():
        cls.tie(members)
