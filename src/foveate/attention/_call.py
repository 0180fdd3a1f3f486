"""One attention call: what a model knows about it, its rows, its state, what it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate import ops
from foveate.ops import BlockLayout, Mask

Tables = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rotary tables (cos, sin), each (1, L, R), of positions (1, L)."""

# Query rows on which a recorded call compares its mass with that of dense attention.
_SAMPLED_ROWS = 64

Slot = dict[str, Any]


class Memory(dict[int, list[Slot]]):
    """State that outlives a call: for every layer a list of slots, one per batch row."""

    def rows(self, layer: int, batch: int) -> list[Slot]:
        """The slots of a layer, made on first use."""
        slots = self.setdefault(layer, [])
        while len(slots) < batch:
            slots.append({})
        return slots


class Shared(NamedTuple):
    """Keys and values in one layer that every row of a batch follows, held once for all of them.

    k, v (1, Hkv, P, D) are a prefix; documents, if any, are the keys and values (1, Hkv, n, D) of
    texts that were read after the prefix, each without the others.
    """

    k: Tensor
    v: Tensor
    documents: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """Itself: copies of a cache follow the same prefix."""
        return self


class Record(NamedTuple):
    """What one call did: its layout, the share of pairs it computed, of mass it kept.

    phase is prefill, decode, or cache: what an eviction left for the calls after it.
    """

    layer: int
    phase: str
    layout: BlockLayout
    density: float
    retained_mass: float


class Result(NamedTuple):
    """Output of a mechanism's computation; lse and layout are only there when recording."""

    out: Tensor
    lse: Tensor | None = None
    layout: BlockLayout | None = None


@dataclass
class Call:
    """What only a model knows about an attention call.

    causal, mask and scale are those of the call itself; layer is the index of `layers`; valid
    (B, Lk) bool marks real keys (False: padding); softcap bounds the logits as in Gemma 2; memory
    lives as long as the sequence; record, if given, is told what the call did. `state` is the
    memory of one row, layer -> slot: what a stateful mechanism reads and writes. rope turns
    positions into the tables q and k were rotated by (None: not rotated); positions (B, Lk) are
    those of the keys (None: 0 … Lk - 1). shared is what all rows follow: it is no part of k and
    v, and only a mechanism that `reads_shared` looks at it. step counts the denoising steps of a
    diffusion model.
    """

    layer: int = 0
    layers: int = 1
    phase: str = "prefill"
    causal: bool = True
    mask: Mask | None = None
    scale: float | None = None
    valid: Tensor | None = None
    softcap: float | None = None
    memory: Memory | None = None
    record: Callable[[Record], None] | None = None
    rope: Tables | None = None
    positions: Tensor | None = None
    shared: Shared | None = None
    step: int = 0
    state: dict[int, Slot] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """What the primitives need to know of it: causal, mask, scale and softcap."""
        return {
            "causal": self.causal,
            "mask": self.mask,
            "scale": self.scale,
            "softcap": self.softcap,
        }

    def row(self, b: int, batch: int) -> Call:
        """The call as one batch row sees it, without padding; fresh state if nothing keeps it."""
        state: dict[int, Slot] = {self.layer: {}}
        if self.memory is not None:
            self.memory.rows(self.layer, batch)
            state = {i: rows[b] for i, rows in self.memory.items() if len(rows) > b}
        own = self.positions
        own = own if own is None or len(own) == 1 else own[b : b + 1]
        if own is not None and self.valid is not None:
            own = own[:, self.valid[b]]
        return dataclasses.replace(self, valid=None, memory=None, state=state, positions=own)

    def tables(self, k_len: int, at: slice | Tensor = slice(None)) -> tuple[Tensor, Tensor] | None:
        """Rotary tables (B|1, n, R) of the keys `at`, all Lk by default; queries are the last."""
        if self.rope is None:
            return None
        own = torch.arange(k_len)[None] if self.positions is None else self.positions
        return self.rope(own[:, at])


def phase_of(q_len: int, k_len: int) -> str:
    """`decode` for a single query at the end of longer keys, else `prefill`."""
    return "decode" if q_len == 1 and k_len > 1 else "prefill"


class Row(NamedTuple):
    """One batch row without its padding: `slots` are its keys, `rows` its queries."""

    b: int
    slots: Tensor | None
    rows: slice | Tensor

    def queries(self, q: Tensor) -> Tensor:
        """The row's queries (1, Hq, l, D)."""
        return q[self.b : self.b + 1, :, self.rows]

    def keys(self, x: Tensor) -> Tensor:
        """The row's keys or values (1, Hkv, n, D), a view where they are consecutive."""
        return x[self.b : self.b + 1, :, slice(None) if self.slots is None else _span(self.slots)]


def _span(at: Tensor) -> slice | Tensor:
    """Ascending indices as a slice where they are consecutive."""
    lo, n = int(at[0]), at.numel()
    return slice(lo, lo + n) if int(at[-1]) - lo + 1 == n else at


def rows_of(call: Call, batch: int, q_len: int) -> Iterator[tuple[int, Row, Call]]:
    """The batch rows that hold a query, each without padding, and the call as the row sees it."""
    for b in range(batch):
        row = call.row(b, batch)
        if call.valid is None:
            yield b, Row(b, None, slice(None)), row
            continue
        rows = call.valid[b, -q_len:].nonzero().squeeze(-1)
        if rows.numel():
            yield b, Row(b, call.valid[b].nonzero().squeeze(-1), _span(rows)), row


@torch.no_grad()
def measure(q: Tensor, k: Tensor, v: Tensor, call: Call, result: Result) -> Record:
    """Density from the layout; retained mass as exp(lse - dense lse) on evenly spaced rows."""
    lq, lk = q.shape[2], k.shape[2]
    layout = result.layout or ops.full_layout(lq, lk, 128, is_causal=call.causal)
    mass = 1.0
    if result.lse is not None:
        rows = torch.linspace(0, lq - 1, min(lq, _SAMPLED_ROWS), device=q.device).long().unique()
        at = rows + max(lk - lq, 0)
        _, dense = ops.attend(q[:, :, rows], k, v, q_pos=at, return_lse=True, **call.options())
        seen = torch.isfinite(dense)
        kept = torch.exp(result.lse[:, :, rows] - dense)[seen]
        mass = float(kept.clamp_max(1).mean()) if kept.numel() else 1.0
    return Record(call.layer, call.phase, layout, layout.density(call.causal), mass)
