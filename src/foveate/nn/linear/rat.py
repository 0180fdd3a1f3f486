"""RAT: recurrence inside chunks, attention across them (2025, paper 275)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._held import token_positions, turned
from foveate.nn._linear import head_width
from foveate.nn._recurrent import Recurrent, State
from foveate.ops import Mask
from foveate.registry import Card, register


@dataclass(frozen=True)
class RatState(State):
    """The running key and value s (B, 2, dim); keys, rotated, and values of finished chunks."""

    keys: Tensor | None = None
    values: Tensor | None = None


@register(
    Card(
        name="rat",
        title="RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling",
        year=2025,
        paper=275,
        claim="a recurrence sums up each chunk in one key and value: attention reads a fraction of "
        "the keys",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L²·D/C) time",
        decoding="a key and a value of each finished chunk, and those of the chunk that is not",
        confidence="high",
        small={"dim": 32, "heads": 4, "chunk": 8},
    )
)
class Rat(Recurrent):
    """Softmax attention to the last gated averages of earlier chunks and to the token's own.

    k̃_t = g_t ⊙ k̃_{t-1} + (1 - g_t) ⊙ k_t with a gate g for each channel, from 0 at the start of
    every `chunk` tokens; values likewise. There are `groups` different q and k, head h takes those
    of group h mod groups. q and k̃ rotate by the number of their chunk where `theta` is not None.
    Raises ValueError for sizes that do not divide.
    """

    State = RatState

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        chunk: int = 16,
        groups: int = 2,
        theta: float | None = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width, groups = head_width(dim, heads), min(groups, heads)
        self.chunk, self.theta = ops.check_block("chunk", chunk), theta
        if heads % ops.check_block("groups", groups):
            raise ValueError(f"heads must be a multiple of groups, got {heads} and {groups}")
        if theta is not None and self.width % 2:
            raise ValueError(f"heads that rotate must have an even width, got {self.width}")
        self.copies = heads // groups
        self.sizes = (dim, dim, dim, groups * self.width, groups * self.width)
        self.inner = nn.Linear(dim, sum(self.sizes), bias=False, **made)
        # A gate near 1 - 1/n remembers about n tokens: from 1 to all of a chunk.
        reach = torch.empty(dim, **made).uniform_(1.0, max(chunk - 1.0, 1.0))
        self.bias = nn.Parameter(reach.log())
        self.out = nn.Linear(dim, dim, bias=False, **made)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Recurrence, then attention across chunks."""
        shown, v, gate, q, k = self.inner(x).split(self.sizes, -1)
        q, k = (y.unflatten(-1, (-1, self.width)).repeat(1, 1, self.copies, 1) for y in (q, k))
        at, real = token_positions(state.pos, x.shape[1], valid)
        averages, s = self._averages(torch.stack((k.flatten(2), v), 2), gate, at, real, state.s)
        k, v = (heads_of(y.to(x.dtype), self.width) for y in averages.unbind(2))
        q = q.transpose(1, 2)
        old = (state.keys, state.values)
        keys, values = self._finished(k, v, old, state.pos, at[:, -1] + 1)
        # A token's own average is of its own chunk: the rotations cancel.
        own = (q.float() * k.float()).sum(-1) * self.width**-0.5
        parts = [(v, own)]
        if keys.shape[2]:
            parts.append(self._across(q, keys, values, at // self.chunk))
        out, _ = ops.merge(parts)
        y = self.out(torch.sigmoid(shown) * joined_heads(out))
        return y, RatState(state.layer, state.pos, s=s, keys=keys, values=values)

    def _averages(
        self, x: Tensor, gate: Tensor, at: Tensor, real: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gated averages of keys and values x (B, L, 2, dim) since the start of the chunk."""
        gate = gate.float() + self.bias.float()
        keep = logsigmoid(gate).masked_fill((at % self.chunk == 0)[..., None], -math.inf)
        keep = keep.masked_fill(~real[..., None], 0.0)
        written = (torch.sigmoid(-gate) * real[..., None])[:, :, None] * x
        return ops.elementwise_scan(written, keep[:, :, None], state, dim=1)

    def _finished(
        self,
        k: Tensor,
        v: Tensor,
        old: tuple[Tensor | None, Tensor | None],
        seen: Tensor,
        now: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of the chunks that end before position `now` (B,) of a row.

        Rows with fewer of them than others have what no query sees in the rest.
        """
        index = torch.arange(int(now.max()) // self.chunk, device=k.device)
        last = (index + 1) * self.chunk - 1 - seen[:, None]
        fresh = (last >= 0)[:, None, :, None]
        rows = last.clamp(0, k.shape[2] - 1)[:, None, :, None].expand(-1, *k.shape[1:2], -1, 1)
        out = []
        for new, held, theta in ((k, old[0], self.theta), (v, old[1], None)):
            new = new.gather(2, rows.expand(-1, -1, -1, self.width))
            new = turned(new, index.expand(len(seen), -1), theta)
            if held is not None:
                held = pad(held, (0, 0, 0, len(index) - held.shape[2]))
                new = torch.where(fresh, new, held)
            out.append(new)
        return out[0], out[1]

    def _across(
        self, q: Tensor, keys: Tensor, values: Tensor, chunk: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention of queries, each in its chunk (B, L), to the chunks before it, with lse."""
        q = turned(q, chunk, self.theta)
        if keys.shape[2] <= int(chunk.min()):  # in decoding all of them are earlier, as a rule
            return ops.attend(q, keys, values, return_lse=True)

        def of(b: Tensor, i: Tensor) -> Tensor:
            return chunk[b, i.clamp(0, chunk.shape[1] - 1)]

        earlier = Mask(
            lambda b, h, i, j: j < of(b, i),
            lambda b, h, i_lo, i_hi, j_lo, j_hi: (j_lo < of(b, i_hi), j_hi < of(b, i_lo)),
            batch=len(chunk),
            name="earlier chunks",
        )
        own = torch.arange(q.shape[2], device=q.device)
        return ops.attend(q, keys, values, mask=earlier, q_pos=own, return_lse=True)
