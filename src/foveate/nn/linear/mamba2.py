"""Transformers are SSMs: Generalized Models and Efficient Algorithms (Mamba-2) (2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu, softplus

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._linear import ShortConv, decay_rates, head_width, step_bias
from foveate.nn._recurrent import Recurrent
from foveate.registry import Card, register


class StateSpaceDual(Recurrent):
    """S_t = exp(-A Δ_t) S_{t-1} + B_t (Δ_t x_t)ᵀ, y_t = S_tᵀ C_t + D x_t, in every head.

    Inputs x have `width` channels in each head, B and C `states`. `counts` are the numbers of
    different x, B and C, each shared by consecutive heads. The output, gated, passes an RMS norm
    over each of `groups` parts of its channels.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int,
        states: int,
        counts: tuple[int, int, int],
        *,
        groups: int = 1,
        conv: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        ops.check_block("states", states)
        for name, count in zip(("x", "B", "C"), counts, strict=True):
            if heads % ops.check_block(f"heads of {name}", count):
                raise ValueError(f"heads must be a multiple of those of {name}: {heads}, {count}")
        self.heads, self.groups, self.widths = heads, groups, (width, states, states)
        self.sizes = tuple(n * w for n, w in zip(counts, self.widths, strict=True))
        channels, mixed = heads * width, sum(self.sizes)
        self.split = (channels, mixed, heads)
        self.inner = nn.Linear(dim, sum(self.split), bias=False, **made)
        self.convs = ShortConv(mixed, conv, bias=True, **made)
        self.log_a = decay_rates(heads, 1.0, 16.0, **made)
        self.step_bias = step_bias(heads, **made)
        self.skip = nn.Parameter(torch.ones(heads, **made))
        self.norm = nn.Parameter(torch.ones(channels, **made))
        self.out = nn.Linear(channels, dim, bias=False, **made)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The recurrence, its gate, and a norm over both."""
        gate, mixed, step = self.inner(x).split(self.split, -1)
        y, s, conv = self.recurrence(mixed, step, valid, state)
        parts = (y * silu(gate)).unflatten(-1, (self.groups, -1))
        y = rms_norm(parts, parts.shape[-1:], eps=1e-5).flatten(-2) * self.norm
        return self.out(y), replace(state, s=s, conv=(conv,))

    def recurrence(
        self, mixed: Tensor, step: Tensor, valid: Tensor | None, state: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masked linear attention, C queries, B keys and Δ x values: y (B, L, channels), states.

        mixed (B, L, ·) are x, B and C before the convolution, step (B, L, heads) Δ before softplus.
        """
        mixed, conv = self.convs(mixed, valid, *state.conv)
        inputs, b, c = (
            self._of_heads(part, width)
            for part, width in zip(mixed.split(self.sizes, -1), self.widths, strict=True)
        )
        step = softplus(step.float() + self.step_bias.float()).mT
        written = (inputs * step[..., None]).to(inputs.dtype)
        decay = -self.log_a.float().exp()[:, None] * step
        out, s = ops.scan(c, b, written, decay=decay, scale=1.0, state=state.s, valid=valid)
        return joined_heads(out + self.skip[:, None, None] * inputs), s, conv

    def _of_heads(self, x: Tensor, width: int) -> Tensor:
        """Heads (B, heads, L, width), each of those given for as many as share it."""
        given = heads_of(x, width)
        return given.repeat_interleave(self.heads // given.shape[1], 1)


@register(
    Card(
        name="mamba2",
        title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through "
        "Structured State Space Duality",
        year=2024,
        claim="one decay for a whole head makes a state space linear attention: larger states at "
        "the speed of matrix products",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D·N) time",
        decoding="a state of expand · dim · N numbers and the last inputs of a convolution",
        confidence="high",
        small={"dim": 32, "heads": 4, "states": 16, "groups": 2},
    )
)
class Mamba2(StateSpaceDual):
    """A gated state space of expand · dim channels in heads, with `states` numbers a channel.

    B and C are shared by the heads of each of `groups`. Raises ValueError for sizes that do not
    divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        states: int = 128,
        groups: int = 1,
        expand: float = 2.0,
        conv: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = head_width(dim, heads, expand)
        counts = (heads, groups, groups)
        made: dict[str, Any] = {"groups": groups, "conv": conv, "device": device, "dtype": dtype}
        super().__init__(dim, heads, width, states, counts, **made)
