"""What attention layers share: projections to heads, rotation, and what decoding keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.ops import Mask


@dataclass(frozen=True)
class KeyValues:
    """What decoding keeps: keys, rotated, and values (B, Hkv, n, D) from position `first` on."""

    keys: Tensor
    values: Tensor
    first: int = 0

    @property
    def pos(self) -> int:
        """Tokens seen."""
        return self.first + self.keys.shape[2]


class Projections(NamedTuple):
    """Weights of a trained layer: q (Hq·D, dim), k and v (Hkv·D, dim), out (dim, Hq·D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    @classmethod
    def of(cls, layer: Any) -> Projections:
        """Those of an attention layer whose linear parts are called as in transformers.

        Raises TypeError for a layer that has no such parts, ValueError for one with biases or with
        other weights besides.
        """
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        parts = [getattr(layer, name, None) for name in names]
        if any(not isinstance(part, nn.Linear) for part in parts):
            raise TypeError(
                f"a layer to convert needs linear q_proj, k_proj, v_proj and o_proj, "
                f"got {type(layer).__name__}"
            )
        if any(part.bias is not None for part in parts if part is not None):
            raise ValueError("a layer to convert must have no biases")
        more = [n for n, _ in layer.named_parameters() if n.partition(".")[0] not in names]
        if more:
            raise ValueError(
                f"a layer to convert must have no weights but its projections, "
                f"got {', '.join(more)}"
            )
        return cls(*(part.weight.detach() for part in parts if part is not None))


@torch.no_grad()
def load_projections(layer: nn.Module, weights: Projections) -> None:
    """Copy trained projections to a layer's q, k, v and out; ValueError when one does not fit."""
    for name, weight in weights._asdict().items():
        mine = layer.get_parameter(f"{name}.weight")
        if weight.shape != mine.shape:
            raise ValueError(
                f"projection {name} must be {tuple(mine.shape)}, got {tuple(weight.shape)}"
            )
        mine.copy_(weight)


def rotary(at: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Rotary tables (…, L, width) of positions at (…, L)."""
    turns = at[..., None] * theta ** -(torch.arange(0, width, 2, device=at.device) / width)
    turns = torch.cat((turns, turns), -1)
    return turns.cos(), turns.sin()


def heads_of(x: Tensor, width: int) -> Tensor:
    """Heads (B, H, L, width) of x (B, L, H·width)."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def joined_heads(x: Tensor) -> Tensor:
    """What heads (B, H, L, width) give side by side, (B, L, H·width)."""
    return x.transpose(1, 2).flatten(2)


class AttentionLayer(nn.Module):
    """Projections of tokens to heads and back; a subclass says what happens between in `attend`.

    x gives the queries, and the keys and values too unless a context does. With `theta` queries
    and keys rotate by their positions; the queries are at the last positions of the keys.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        *,
        head_dim: int | None = None,
        theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("kv_heads", kv_heads)):
            ops.check_block(name, size)
        if head_dim is None and dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim {dim} and {heads} heads")
        width = dim // heads if head_dim is None else ops.check_block("head_dim", head_dim)
        if theta is not None and width % 2:
            raise ValueError(f"heads that rotate must have an even width, got {width}")
        self.heads, self.kv_heads, self.head_dim, self.theta = heads, kv_heads, width, theta
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.q = nn.Linear(dim, heads * width, **made)
        self.k, self.v = (nn.Linear(dim, kv_heads * width, **made) for _ in range(2))
        self.out = nn.Linear(heads * width, dim, **made)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask | None) -> Tensor:
        """q (B, Hq, Lq, D), k and v (B, Hkv, Lk, D) -> (B, Hq, Lq, D)."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        causal: bool = True,
        mask: Mask | None = None,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """x (B, L, dim), context (B, Lk, dim) -> y (B, L, dim), with `return_state` (y, state).

        With a state, `KeyValues`, x goes on where it ended. `mask` joins causality, on absolute
        positions. Raises ValueError for a state together with a context or without causality.
        """
        if (state is not None or return_state) and (context is not None or not causal):
            raise ValueError("a state is kept for causal self-attention only")
        old, first = (0, 0) if state is None else (state.pos, state.first)
        source = x if context is None else context
        end = old + source.shape[1]
        q, k, v = self.split(x, source)
        q, k = self._turned(q, max(end - x.shape[1], 0)), self._turned(k, old)
        if state is not None:
            k, v = torch.cat((state.keys, k), 2), torch.cat((state.values, v), 2)
        seen = mask if mask is None or first == 0 else mask.shifted(first)
        y = self.joined(self.attend(q, k, v, causal, seen))
        return (y, self.kept(k, v, first)) if return_state else y

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token x (B, dim) after those of the state: y (B, dim) and the state after it."""
        y, state = self.forward(x[:, None], state=state, return_state=True)
        return y[:, 0], state

    def load(self, weights: Projections) -> None:
        """Take over projections of the sizes of its own; ValueError when one does not fit."""
        load_projections(self, weights)

    def kept(self, keys: Tensor, values: Tensor, first: int) -> KeyValues:
        """What decoding keeps of keys and values from position `first` on: all of them."""
        return KeyValues(keys, values, first)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x (B, L, dim), keys and values of a source, (B, H, L, D) each, not rotated."""
        q, k, v = (heads_of(y, self.head_dim) for y in (self.q(x), self.k(source), self.v(source)))
        return q, k, v

    def joined(self, out: Tensor) -> Tensor:
        """What heads give, (B, H, L, D) -> (B, L, dim)."""
        y: Tensor = self.out(joined_heads(out))
        return y

    def _turned(self, x: Tensor, first: int) -> Tensor:
        """Heads (B, H, L, D) rotated by the positions from `first` on."""
        if self.theta is None:
            return x
        at = torch.arange(first, first + x.shape[2], device=x.device)
        return ops.rope(x, *rotary(at, self.head_dim, self.theta))
