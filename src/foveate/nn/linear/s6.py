"""Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from foveate import ops
from foveate.nn._linear import ShortConv, head_width, step_bias
from foveate.nn._recurrent import Recurrent
from foveate.ops.tile import recomputed
from foveate.registry import Card, register

# Tokens whose states (channels · N numbers each) are in memory at once.
_CHUNK = 64


def selective_scan(
    x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t a) ⊙ h_{t-1} + (Δ_t x_t) b_tᵀ, y_t = h_t c_t for every channel by itself.

    x and step Δ (B, L, D), a (D, N) < 0, b and c (B, L, N), state (B, D, N) or None for zeros ->
    y like x, state after the last token in float32.
    """
    if state is None:
        state = x.new_zeros(x.shape[0], *a.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    outs = []
    for parts in zip(*(y.split(_CHUNK, 1) for y in (x, step, b, c)), strict=True):
        out, state = recomputed(_chunk, *parts, a, state)
        outs.append(out)
    return torch.cat(outs, 1).to(x.dtype), state


def _chunk(
    x: Tensor, step: Tensor, b: Tensor, c: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Some tokens, all their states at once."""
    written = (step * x)[..., None] * b[:, :, None]
    h, last = ops.elementwise_scan(written.to(state.dtype), step[..., None] * a, state, dim=1)
    # A copy: a view would keep the states of all tokens.
    return (h @ c.to(h.dtype)[..., None]).squeeze(-1), last.clone()


class SelectiveScan(nn.Module):
    """Convolution and selective recurrence of channels: Δ, B and C are made from the token.

    N is `states`, Δ goes through `rank` numbers; with `normed` Δ, B and C pass an RMS norm each.
    """

    def __init__(
        self,
        channels: int,
        rank: int,
        *,
        states: int = 16,
        conv: int = 4,
        normed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.sizes = (ops.check_block("rank", rank), ops.check_block("states", states), states)
        self.conv = ShortConv(channels, conv, bias=True, **made)
        self.terms = nn.Linear(channels, sum(self.sizes), bias=False, **made)
        self.norms = nn.ModuleList(
            nn.RMSNorm(n, 1e-6, **made) if normed else nn.Identity() for n in self.sizes
        )
        self.step = nn.Linear(rank, channels, bias=False, **made)
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        self.step_bias = step_bias(channels, **made)
        rates = torch.arange(1, states + 1, **made).log()
        self.log_a = nn.Parameter(rates.repeat(channels, 1))
        self.skip = nn.Parameter(torch.ones(channels, **made))

    def selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Δ (B, L, channels) in float32, B and C (B, L, N) of tokens after the convolution."""
        parts = self.terms(x).split(self.sizes, -1)
        step, b, c = (norm(part) for norm, part in zip(self.norms, parts, strict=True))
        return softplus(self.step(step).float() + self.step_bias.float()), b, c

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        state: Tensor | None = None,
        conv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, channels) -> y alike, and the states of recurrence and convolution after it."""
        x, conv = self.conv(x, valid, conv)
        step, b, c = self.selected(x)
        if valid is not None:  # no step, no decay and nothing written
            step = step.masked_fill(~valid[..., None], 0.0)
        y, state = selective_scan(x, step, -self.log_a.float().exp(), b, c, state)
        return y + x * self.skip, state, conv


@register(
    Card(
        name="s6",
        title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        year=2023,
        claim="a state space whose steps depend on the token selects what to keep",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D·N) time",
        decoding="a state of expand · dim · N numbers and the last inputs of a convolution",
        confidence="high",
        small={"dim": 32, "states": 4},
    )
)
class S6(Recurrent):
    """A gated selective state space of expand · dim channels with `states` numbers each.

    `rank` None is dim / 16, rounded up. Raises ValueError where expand · dim is no whole number.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 16,
        expand: float = 2.0,
        conv: int = 4,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = head_width(dim, 1, expand)
        rank = -(-dim // 16) if rank is None else rank
        self.inner = nn.Linear(dim, 2 * channels, bias=False, **made)
        self.scan = SelectiveScan(channels, rank, states=states, conv=conv, **made)
        self.out = nn.Linear(channels, dim, bias=False, **made)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The selective recurrence beside its gate."""
        inner, gate = self.inner(x).chunk(2, -1)
        y, s, conv = self.scan(inner, valid, state.s, *state.conv)
        return self.out(y * silu(gate)), replace(state, s=s, conv=(conv,))
