"""What recurrent layers share: how they are called, padding, and the state that decoding keeps."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.ops import Mask
from foveate.registry import Card


@dataclass(frozen=True)
class State:
    """What a recurrent layer keeps while decoding; a layer that keeps more adds fields.

    `layer` is the name of its mechanism, pos the real tokens seen in each row (B,), s the state of
    the recurrence and z a running normaliser (both (B, …), float32), conv the last inputs of the
    short convolutions (B, width - 1, channels).
    """

    layer: str
    pos: Tensor
    s: Tensor | None = None
    z: Tensor | None = None
    conv: tuple[Tensor | None, ...] = ()


class Recurrent(nn.Module):
    """A layer x (B, L, dim) -> (B, L, dim) whose decoding keeps a `State`.

    A subclass writes `run`, the causal form, and `whole` for other patterns that its card names.
    """

    card: ClassVar[Card]
    State: ClassVar[type[State]] = State

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = ops.check_block("dim", dim)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Go on from a state: x (B, L, dim) -> y (B, L, dim) and the state after it.

        Real tokens are those of valid (B, L), None for all; they come first in each row.
        """
        raise NotImplementedError

    def whole(self, x: Tensor, source: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
        """Both directions (x and source the same), or a context as source (B, Lk, dim).

        valid (B, Lk) are the real tokens of the source. In causal cross-attention x is at the last
        positions of the source.
        """
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
        """x (B, L, dim) -> y (B, L, dim), with `return_state` (y, state).

        With a state x goes on where it ended. `mask` is `ops.padding(valid)`; hidden tokens are as
        if they were not there, and give 0. Raises ValueError for a pattern that is not on the
        card, for another mask, for a state where none is kept, and for a state of another layer or
        batch.
        """
        self._check(x, context, causal, state is not None or return_state)
        source = x if context is None else context
        valid = ops.real_tokens(mask, source.shape[0], source.shape[1])
        if context is not None or not causal:
            y = self.whole(x, source, valid, causal)
            return y if valid is None or context is not None else hidden(y, valid)
        start = self._start(x, state)
        if valid is None:
            y, after = self.run(x, None, start)
            counts: Any = x.shape[1]
        else:
            packed, first, order = real_first(x, valid)
            y, after = self.run(packed, first, start)
            y = back_in_place(y, valid, order)
            counts = valid.sum(1)
        return (y, replace(after, pos=start.pos + counts)) if return_state else y

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One token x (B, dim) after those of the state: y (B, dim) and the state after it."""
        y, state = self.forward(x[:, None], state=state, return_state=True)
        return y[:, 0], state

    def _check(self, x: Tensor, context: Tensor | None, causal: bool, keeps: bool) -> None:
        """Refuse a call that the layer cannot serve."""
        source = "self" if context is None else "cross"
        pattern = f"{'causal' if causal else 'noncausal'} {source}"
        if pattern not in self.card.patterns:
            raise ValueError(
                f"{self.card.name} does not do {pattern}-attention; "
                f"it does {', '.join(self.card.patterns)}"
            )
        if keeps and pattern != "causal self":
            raise ValueError("a state is kept for causal self-attention only")
        for name, tokens in (("x", x), ("context", context)):
            if tokens is None:
                continue
            if tokens.dim() != 3 or tokens.shape[2] != self.dim or tokens.shape[1] == 0:
                raise ValueError(
                    f"{name} must be (batch, length >= 1, {self.dim}), got {tuple(tokens.shape)}"
                )

    def _start(self, x: Tensor, state: Any) -> Any:
        """The state to go on from, which must be of this layer and of x's batch."""
        name, batch = self.card.name, x.shape[0]
        if state is None:
            return self.State(name, torch.zeros(batch, dtype=torch.long, device=x.device))
        if not isinstance(state, self.State) or state.layer != name:
            got = getattr(state, "layer", type(state).__name__)
            raise ValueError(f"{name} got the state of another layer, {got}")
        if len(state.pos) != batch:
            raise ValueError(
                f"{name} got a state of {len(state.pos)} rows for x of {batch}: they must agree"
            )
        return state


def state_bytes(state: Any) -> int:
    """Bytes that decoding keeps in a state of any layer, or in a sequence of them; counts aside."""
    return sum(x.nbytes for x in _tensors(state) if x.is_floating_point())


def _tensors(state: Any) -> list[Tensor]:
    """All tensors in a state."""
    if isinstance(state, Tensor):
        return [state]
    if is_dataclass(state):
        state = [getattr(state, f.name) for f in fields(state)]
    if isinstance(state, (tuple, list)):
        return [x for item in state for x in _tensors(item)]
    return []


def real_first(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of x (B, L, ·) with the real ones first in each row and zeros after them.

    Also which of them are real (B, L), and the order for `back_in_place`.
    """
    order = (~valid).int().argsort(dim=1, stable=True)
    first = valid.gather(1, order)
    return hidden(_taken(x, order), first), first, order


def back_in_place(y: Tensor, valid: Tensor, order: Tensor) -> Tensor:
    """Tokens in the order of `real_first` where they were before, zeros for what is not real."""
    return hidden(_taken(y, order.argsort(1)), valid)


def hidden(x: Tensor, valid: Tensor) -> Tensor:
    """x (B, L, ·) with zeros for what is no real token."""
    return x.masked_fill(~valid[..., None], 0.0)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of x (B, L, ·) in another order (B, L)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
