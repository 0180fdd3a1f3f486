"""Titans: Learning to Memorize at Test Time (2025, paper 51)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, pad

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._held import Held, attend_held, token_positions, turned
from foveate.nn._linear import Readout, ShortConv, head_width
from foveate.nn._recurrent import Recurrent, State
from foveate.ops.memory_scan import stretches
from foveate.registry import Card, register

FORMS = ("lmm", "mac", "mag", "mal")


@dataclass(frozen=True)
class TitansState(State):
    """The memory, and keys and values of the window or the segment with the persistent tokens."""

    memory: ops.MemoryState | None = None
    held: Held | None = None


class Memory(nn.Module):
    """A memory for each head that is written at every token of x and read there.

    q, k and v pass a convolution and SiLU, q and k have length 1; steps (up to 1 / chunk), momentum
    and forgetting are gates of x.
    """

    def __init__(
        self, dim: int, heads: int, depth: int, chunk: int, read: Any, conv: int, **made: Any
    ) -> None:
        super().__init__()
        self.width, self.chunk, self.read = head_width(dim, heads), chunk, read
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **made)
        self.convs = ShortConv(3 * dim, conv, **made)
        self.gates = nn.Linear(dim, 3 * heads, **made)
        # To begin with, a token forgets little: one part in about 50.
        nn.init.zeros_(self.gates.bias)
        nn.init.constant_(self.gates.bias[2 * heads :], -4.0)
        hidden = [2 * self.width] * (ops.check_block("depth", depth) - 1)
        sizes = [self.width, *hidden, self.width]
        self.weights = nn.ParameterList(
            torch.randn(heads, n, m, **made) * n**-0.5 for n, m in pairwise(sizes)
        )

    def forward(
        self, x: Tensor, valid: Tensor | None, state: ops.MemoryState, conv: Tensor | None
    ) -> tuple[Tensor, ops.MemoryState, Tensor]:
        """x (B, L, dim) -> what is read (B, H, L, width), states of memory and convolution."""
        mixed, conv = self.convs(self.qkv(x), valid, conv)
        q, k, v = (heads_of(y, self.width) for y in mixed.chunk(3, -1))
        rate, momentum, forget = self.gates(x).float().mT.chunk(3, 1)
        out, state = ops.memory_scan(
            normalize(q, dim=-1),
            normalize(k, dim=-1),
            v,
            state,
            rate=torch.sigmoid(rate) / self.chunk,
            log_momentum=logsigmoid(momentum),
            log_keep=logsigmoid(-forget),
            chunk=self.chunk,
            read=self.read,
            valid=valid,
        )
        return out, state, conv

    def start(self, rows: int) -> ops.MemoryState:
        """The memory of rows that have seen nothing."""
        return ops.memory_start(list(self.weights), rows)


@register(
    Card(
        name="titans",
        title="Titans: Learning to Memorize at Test Time",
        year=2025,
        paper=51,
        claim="a memory that takes gradient steps while it reads holds what a window has lost",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D·(D + chunk)) time, with attention O(L·D·window) more",
        decoding="weights and momentum of the memory, keys and values of a window or segment",
        confidence="high for the memory; medium for the gate and the persistent tokens",
        small={"dim": 32, "heads": 4, "chunk": 8, "window": 8, "persistent": 3},
    )
)
class Titans(Recurrent):
    """A memory learned at test time: alone ("lmm"), or with attention in one of three forms.

    "mag" gates attention to a window by the memory, "mal" attends to what the memory gives, and
    "mac" cuts the row into segments of `chunk` tokens that attend to themselves and to what the
    memory held of them before, then writes the result. Attention sees the first `persistent`
    tokens, learned ones. The memory of each head has `depth` matrices; `read` as in
    `ops.memory_scan`. Attention heads rotate by their positions where `theta` is not None. Raises
    ValueError for another form and for sizes that do not fit.
    """

    State = TitansState

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        form: Literal["lmm", "mac", "mag", "mal"] = "mag",
        depth: int = 2,
        chunk: int = 16,
        read: Literal["lag", "token"] = "token",
        window: int = 64,
        persistent: int = 4,
        conv: int = 4,
        theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if persistent < 0:
            raise ValueError(f"persistent must be at least 0, got {persistent}")
        self.form, self.theta = form, theta
        self.chunk, self.window = ops.check_block("chunk", chunk), ops.check_block("window", window)
        self.width = head_width(dim, heads)
        if theta is not None and self.width % 2:
            raise ValueError(f"heads that rotate must have an even width, got {self.width}")
        self.memory = Memory(dim, heads, depth, chunk, read, conv, **made)
        self.readout = Readout(dim, heads, self.width, gate="sigmoid", **made)
        if form == "lmm":
            return
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **made)
        self.persistent = nn.Parameter(torch.randn(persistent, dim, **made) * 0.02)
        if form in ("mac", "mag"):
            self.norms = nn.ModuleList(nn.RMSNorm(dim, **made) for _ in range(2))
        if form == "mac":
            self.ask = nn.Linear(dim, dim, bias=False, **made)
            self.ask_conv = ShortConv(dim, conv, **made)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The form's own way, with the persistent tokens first where nothing was seen before."""
        if state.memory is None:
            state = TitansState(
                state.layer, state.pos, memory=self.memory.start(len(x)), conv=(None, None)
            )
        if self.form == "lmm":
            out, memory, conv = self.memory(x, valid, state.memory, state.conv[0])
            after = TitansState(state.layer, state.pos, memory=memory, conv=(conv, None))
            return self.readout(out, x), after
        if self.form == "mac":
            return self._in_segments(x, valid, state)
        return self._over_a_window(x, valid, state)

    def _over_a_window(
        self, x: Tensor, valid: Tensor | None, state: Any
    ) -> tuple[Tensor, TitansState]:
        """Attention beside the memory ("mag"), or after it ("mal")."""
        always = len(self.persistent)
        fresh = state.held is None
        if fresh:
            x = torch.cat((self.persistent.expand(len(x), -1, -1), x), 1)
            valid = None if valid is None else pad(valid, (always, 0), value=True)
        at, real = token_positions(state.pos, x.shape[1], valid, 0 if fresh else always)
        recalled, memory, conv = self.memory(x, valid, state.memory, state.conv[0])
        source = joined_heads(recalled) if self.form == "mal" else x
        q, k, v = (heads_of(y, self.width) for y in self.qkv(source).chunk(3, -1))
        held = Held(turned(k, at, self.theta), v, at, real)
        held = held if state.held is None else state.held.joined(held)
        out = attend_held(turned(q, at, self.theta), at, at + 1 - self.window, held, always)
        if self.form == "mag":
            out = self._gated(out, recalled)
        y = self.readout(out, x)
        kept = held.since(at[:, -1] + 2 - self.window, always)
        after = TitansState(state.layer, state.pos, memory=memory, held=kept, conv=(conv, None))
        return y[:, always:] if fresh else y, after

    def _in_segments(
        self, x: Tensor, valid: Tensor | None, state: Any
    ) -> tuple[Tensor, TitansState]:
        """Memory as context: segment by segment, in each row its own."""
        asked, ask_conv = self.ask_conv(self.ask(x), valid, state.conv[1])
        asked = normalize(heads_of(asked, self.width), dim=-1)
        held = self._persistent(len(x)) if state.held is None else state.held
        memory, conv, outs = state.memory, state.conv[0], []
        always = len(self.persistent)
        at, real = token_positions(state.pos, x.shape[1], valid, always)
        begun = (at - always) // self.chunk * self.chunk + always
        for first, last in stretches(state.pos, x.shape[1], self.chunk):
            part = slice(first, last)
            here, places, own = x[:, part], at[:, part], real[:, part]
            recalled = joined_heads(ops.memory_read(asked[:, :, part], memory.open(self.chunk)))
            q, fresh = self._shown(recalled, here, places, own)
            held = held.since(begun[:, first], always).joined(fresh)
            out = attend_held(q, places, begun[:, part], held, always)
            read, memory, conv = self.memory(joined_heads(out), own, memory, conv)
            outs.append(self.readout(self._gated(out, read), here))
        state = TitansState(state.layer, state.pos, memory=memory, held=held, conv=(conv, ask_conv))
        return torch.cat(outs, 1), state

    def _persistent(self, rows: int) -> Held:
        """Keys and values of the persistent tokens."""
        at = torch.arange(len(self.persistent), device=self.persistent.device).expand(rows, -1)
        _, k, v = (
            heads_of(y, self.width).expand(rows, -1, -1, -1)
            for y in self.qkv(self.persistent)[None].chunk(3, -1)
        )
        return Held(turned(k, at, self.theta), v, at, torch.ones_like(at, dtype=torch.bool))

    def _shown(self, recalled: Tensor, x: Tensor, at: Tensor, real: Tensor) -> tuple[Tensor, Held]:
        """Queries of tokens; keys and values of them and of what was recalled at each, beside."""
        both = torch.stack((recalled, x), 2).flatten(1, 2)
        at, real = at.repeat_interleave(2, 1), real.repeat_interleave(2, 1)
        q, k, v = (heads_of(y, self.width) for y in self.qkv(both).chunk(3, -1))
        q, k = (turned(y, at, self.theta) for y in (q, k))
        return q[:, :, 1::2], Held(k, v, at, real)

    def _gated(self, out: Tensor, recalled: Tensor) -> Tensor:
        """Attention's heads (B, H, L, width) where the memory's let them through."""
        y, gate = (
            norm(joined_heads(z)) for norm, z in zip(self.norms, (out, recalled), strict=True)
        )
        return heads_of(y * torch.sigmoid(gate), self.width)
