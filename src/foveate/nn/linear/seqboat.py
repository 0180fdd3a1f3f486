"""SeqBoat: tokens that are activated attend to each other (2023, paper 299)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate import ops
from foveate.nn._held import Held, attend_held, token_positions, turned
from foveate.nn._recurrent import Recurrent, State, back_in_place, hidden, real_first
from foveate.ops.tile import recomputed
from foveate.registry import Card, register

# Tokens whose states (dim · N numbers each) are in memory at once.
_CHUNK = 64


@dataclass(frozen=True)
class SeqBoatState(State):
    """Averages s, keys and values of the last activated tokens, how many there were (B,)."""

    held: Held | None = None
    active: Tensor | None = None


class Average(nn.Module):
    """Damped moving averages of each channel, `states` of them, weighed into one."""

    def __init__(self, dim: int, states: int, **made: Any) -> None:
        super().__init__()
        self.rise, self.fall, self.read = (
            nn.Parameter(torch.randn(dim, states, **made) * scale) for scale in (0.2, 0.2, 1.0)
        )
        # Averages come in pairs of opposite signs.
        signs = 1.0 - 2.0 * (torch.arange(states, **made) % 2)
        self.write = nn.Parameter(torch.randn(dim, states, **made) * 0.02 + signs)

    def forward(self, x: Tensor, real: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, L, dim) -> averages alike and the state (B, dim, states) in float32."""
        part = torch.sigmoid(self.rise.float())
        decay = torch.log1p(-part * torch.sigmoid(self.fall.float()))
        write = part * self.write.float()
        read = self.read.float() * self.read.shape[1] ** -0.5
        if state is None:
            state = decay.new_zeros(len(x), *decay.shape)
        outs = []
        for tokens, own in zip(x.split(_CHUNK, 1), real.split(_CHUNK, 1), strict=True):
            out, state = recomputed(_averaged, tokens, own, decay, write, read, state)
            outs.append(out)
        return torch.cat(outs, 1).to(x.dtype), state


def _averaged(
    x: Tensor, real: Tensor, decay: Tensor, write: Tensor, read: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Some tokens; what is not real is not averaged and lets nothing decay."""
    x, kept = x * real[..., None], decay * real[..., None, None]
    h, last = ops.elementwise_scan(x[..., None] * write, kept, state, dim=1)
    # A copy: a view would keep the states of all tokens.
    return (h * read).sum(-1), last.clone()


@register(
    Card(
        name="seqboat",
        title="Sparse Modular Activation for Efficient Sequence Modeling",
        year=2023,
        paper=299,
        claim="a layer learns which tokens need attention; the others cost no more than an average",
        kind="module",
        family="linear",
        patterns=("noncausal self", "causal self"),
        pretrained="scratch",
        cost="O(L·D·N + A·window·D) time for A activated tokens",
        decoding="moving averages, keys and values of the last `window` activated tokens",
        confidence="high",
        small={"dim": 32, "width": 16, "states": 4, "window": 5},
    )
)
class SeqBoat(Recurrent):
    """y = SiLU(x + a projection of averages + attention of the tokens that are activated).

    m is SiLU of moving averages of x with `states` decays a channel, in both directions where not
    causal. A token is activated where the second of two logits of m is the larger; its attention
    is weighed by that one's probability at a learned temperature, `temperature` · sqrt(dim) at
    first. Activated tokens see those up to `window` activated ones away, by queries and keys of
    `width` channels, rotated by positions in the row, and values of `expand` · dim.
    Raises ValueError for sizes that do not fit.
    """

    State = SeqBoatState

    def __init__(
        self,
        dim: int,
        *,
        width: int = 128,
        states: int = 16,
        window: int = 128,
        expand: int = 2,
        temperature: float = 1.0,
        theta: float | None = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, size in (("width", width), ("states", states), ("expand", expand)):
            ops.check_block(name, size)
        if theta is not None and width % 2:
            raise ValueError(f"keys that rotate must have an even width, got {width}")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.window, self.theta = ops.check_block("window", window), theta
        self.sizes = (width, expand * dim, expand * dim)
        self.ahead, self.back = (Average(dim, states, **made) for _ in range(2))
        self.skip = nn.Parameter(torch.randn(dim, **made))
        self.route, self.plain = nn.Linear(dim, 2, **made), nn.Linear(dim, dim, **made)
        start = math.log(temperature * dim**0.5)
        self.log_temperature = nn.Parameter(torch.full((), start, **made))
        self.inner = nn.Linear(dim, sum(self.sizes), **made)
        self.scales = nn.Parameter(torch.ones(2, width, **made))
        self.shifts = nn.Parameter(torch.zeros(2, width, **made))
        self.out = nn.Linear(expand * dim, dim, **made)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Averages of what came before, and attention to the last activated tokens."""
        at, real = token_positions(state.pos, x.shape[1], valid)
        averages, s = self.ahead(x, real, state.s)
        m = silu(averages + self.skip * x)
        weight, active = self.activated(m, real)
        before = torch.zeros_like(state.pos) if state.active is None else state.active
        held: Held | None = state.held
        attended = torch.zeros_like(x)
        if active.any():
            tokens, places, own, order = _first(m, at, active)
            rank, _ = token_positions(before, tokens.shape[1], own)
            q, k, v, gate = self._terms(tokens, places)
            fresh = Held(k, v, rank, own)
            held = fresh if held is None else held.joined(fresh)
            out = attend_held(q, rank, rank - self.window, held)
            held = held.since(rank[:, -1] + 1 - self.window)
            attended = self._back(out, gate, own, order, weight)
        after = SeqBoatState(state.layer, state.pos, s=s, held=held, active=before + active.sum(1))
        return silu(self.plain(m) + attended + x), after

    def whole(self, x: Tensor, source: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
        """Averages in both directions, and attention to both sides."""
        if valid is None:
            return self._both(x, torch.ones_like(x[..., 0], dtype=torch.bool))
        packed, first, order = real_first(x, valid)
        return back_in_place(self._both(packed, first), valid, order)

    def activated(self, m: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of each token's attention and whether it is activated at all, (B, L) both.

        Gradients reach the router through the weight alone.
        """
        logits = self.route(m).float()
        chances = (logits * torch.exp(-self.log_temperature.float())).softmax(-1)
        active = (logits.argmax(-1) == 1) & real
        return chances[..., 1] * active, active

    def _both(self, x: Tensor, real: Tensor) -> Tensor:
        """Both directions of rows whose real tokens come first."""
        ahead, _ = self.ahead(x, real, None)
        back, _ = self.back(x.flip(1), real.flip(1), None)
        m = silu(ahead + back.flip(1) + self.skip * x)
        weight, active = self.activated(m, real)
        attended = torch.zeros_like(x)
        if active.any():
            at = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
            tokens, places, own, order = _first(m, at, active)
            q, k, v, gate = self._terms(tokens, places)
            mask = ops.window(self.window + 1) & ops.padding(own)
            attended = self._back(ops.attend(q, k, v, mask=mask), gate, own, order, weight)
        return silu(self.plain(m) + attended + x)

    def _terms(self, m: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, 1, n, ·) of activated tokens, and a gate (B, n, ·)."""
        shared, gate, v = silu(self.inner(m)).split(self.sizes, -1)
        q, k = (
            turned((shared * scale + shift)[:, None], at, self.theta)
            for scale, shift in zip(self.scales, self.shifts, strict=True)
        )
        return q, k, v[:, None], gate

    def _back(
        self, out: Tensor, gate: Tensor, own: Tensor, order: Tensor, weight: Tensor
    ) -> Tensor:
        """What attention gives at the places (B, L) of the tokens, 0 at all others."""
        y = hidden(self.out(out[:, 0] * gate), own)
        at = order[..., None].expand(-1, -1, self.dim)
        spread = y.new_zeros(*weight.shape, self.dim).scatter(1, at, y)
        return spread * weight[..., None].to(y.dtype)


def _first(m: Tensor, at: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activated tokens (B, n, dim) and positions (B, n), which of them there are, their places."""
    tokens, own, order = real_first(m, active)
    count = int(active.sum(1).max())
    order = order[:, :count]
    return tokens[:, :count], at.gather(1, order), own[:, :count], order
