"""The cache layer that drops tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Record, token_layout
from foveate.cache.base import Eviction, Packed, Slots, Tables
from foveate.hf.layers import Growing, PolicyLayer, Recorder, real_tokens


class EvictionLayer(PolicyLayer):
    """Holds the slots its policy keeps, for every kv head of every row, without padding.

    Slots that are `read_densely` are read by `attend`; others are what `update` returns,
    short rows filled up in front.
    """

    def __init__(self, policy: Eviction, tables: Tables | None = None) -> None:
        super().__init__(policy)
        self.tables = tables
        self.slots: Slots | None = None
        self.real: list[int] = []  # tokens of every row seen so far, without padding
        self._new: Packed = {}
        self._grown: Slots | None = None
        self._growing: dict[str, Growing] = {}
        self._fresh: list[Tensor | slice] = []

    def stored(self) -> int:
        """Slots of the longest head."""
        return 0 if self.slots is None else self.slots.width

    def take_over(self, keys: Tensor, values: Tensor) -> None:
        """Hold the tokens (B, Hkv, n, ·) of another cache."""
        self.await_call()
        self.update(keys, values)
        self.admit(None, keys.shape[0], keys.shape[2])
        self._new = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """All slots and the new tokens; only the new ones where `attend` reads the slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.expect()
        self._new = {"k": key_states, "v": value_states}
        self.seen += key_states.shape[2]
        self._grown = self._appended(None)
        if self.reads:
            return key_states, value_states
        heads = key_states.shape[:2]
        return tuple(self._grown.padded(name).unflatten(0, heads) for name in self._new)

    def _appended(self, valid: Tensor | None) -> Slots:
        """The slots and the new tokens, of which valid (B, l) are none of padding."""
        k = self._new["k"]
        rows, heads = k.shape[:2]
        if self.slots is None:
            count = rows * heads
            empty = {n: x.new_empty(count, 0, *x.shape[3:]) for n, x in self._new.items()}
            empty |= {n: k.new_empty(count, 0, dtype=torch.float32) for n in self.policy.notes}
            self.slots = Slots(empty, [0] * count)
            self.real = [0] * rows
        new = self._new | self._noted(valid)
        return self.slots.append({n: x.flatten(0, 1) for n, x in new.items()}, self._join)

    def _noted(self, valid: Tensor | None) -> Packed:
        """Notes (B, Hkv, l) of the new tokens: what is known of them, 0 under other names."""
        k = self._new["k"]
        rows, heads, length = k.shape[:3]
        notes = dict.fromkeys(self.policy.notes, k.new_zeros(rows, length, dtype=torch.float32))
        if "position" in notes or "count" in notes:
            real = k.new_ones(rows, length, dtype=torch.bool) if valid is None else valid
            start = torch.tensor(self.real, device=k.device)[:, None] - 1
            known = {"position": real.cumsum(1) + start, "count": real}
            notes |= {name: x.float() for name, x in known.items() if name in notes}
        return {name: x[:, None].expand(-1, heads, -1) for name, x in notes.items()}

    def _join(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        """Keys and values grow in place; notes are replaced after every call."""
        if name not in self._new:
            return torch.cat([held, new], 1)
        return self._growing.setdefault(name, Growing(1)).appended(held, new)

    def admit(self, valid: Tensor | None, batch: int, q_len: int) -> Tensor | None:
        """Take in the new tokens; validity (B, ·) of what `update` returned, None: all real."""
        before, grown = self.slots, self._grown
        if before is None or grown is None:
            raise RuntimeError("admit comes after update")
        self._fresh = real_tokens(valid, batch)
        if valid is None:
            self.slots = grown
            new = [q_len] * batch
        else:
            heads = len(before.lengths) // batch
            real = self._appended(valid)
            fresh = real.filled()
            fresh[:, -q_len:] &= valid.repeat_interleave(heads, 0)
            self.slots = real.keep(fresh)
            new = valid.sum(1).tolist()
        self.real = [n + m for n, m in zip(self.real, new, strict=True)]
        self._grown = None
        if self.reads and before.width:
            return valid
        if valid is None and grown.even:
            return None
        filled = grown.filled()[:: len(grown.lengths) // batch]
        if valid is not None:
            filled[:, -q_len:] &= valid
        return filled

    def attend(self, q: Tensor, *, scale: float | None, softcap: float | None) -> Tensor:
        """Dense attention (B, Hq, Lq, Dv) of the call's queries over the slots of their rows."""
        out = q.new_zeros(*q.shape[:3], self._new["v"].shape[3])
        for b, row in enumerate(self._rows()):
            heads = q.shape[1] // len(row.lengths)
            first = 0
            for part in _parts(row):
                span = slice(first, first + heads * len(part.lengths))
                first = span.stop
                queries = q[b : b + 1, span, self._fresh[b]]
                bias = None
                # Without weights to add, attention takes its fastest path.
                if "count" in row.held and bool((part.held["count"] != 1).any()):
                    weight = part.padded("count").log()[None, :, None]
                    bias = weight.repeat_interleave(heads, 1)
                k, v = part.padded("k")[None], part.padded("v")[None]
                if length := queries.shape[2]:
                    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "bias": bias}
                    found = ops.attend(queries, k, v, causal=length > 1, **options)
                    out[b, span, self._fresh[b]] = found[0]
        return out

    def finish(self, q: Tensor, *, scale: float | None, record: Recorder | None, at: int) -> None:
        """Note what the call showed, and evict where it is due, row by row."""
        if not self._new:
            return
        self._new = {}
        prefill = q.shape[2] > 1 or self.seen == 1
        rows, evicted = self._rows(), False
        for b, row in enumerate(rows):
            queries = q[b : b + 1, :, self._fresh[b]]
            if not queries.shape[2]:
                continue
            if self.policy.notes:
                row = self._observed(queries, row, scale)
            if self.policy.due(self.policy.load(row.lengths), prefill=prefill):
                scores = self._scores(queries, row, scale)
                kept = self.policy.keep(scores)
                if record is not None and prefill:
                    record(_kept_mass(queries, row, kept, scale, at))
                row = self.policy.merge(row, scores, kept, rope=self.tables, layer=at)
                evicted = True
            rows[b] = row
        if evicted:
            self._growing = {}
            self.slots = rows[0] if len(rows) == 1 else Slots.joined(rows)
        elif self.slots is not None and self.policy.notes:
            notes = {name: torch.cat([x.flat(name) for x in rows]) for name in self.policy.notes}
            self.slots = self.slots.replaced(notes)

    def _observed(self, q: Tensor, row: Slots, scale: float | None) -> Slots:
        """A row with its notes brought up to date."""
        found: dict[str, list[Tensor]] = {}
        for part, queries in zip(_parts(row), _queries(q, row), strict=True):
            k, notes = part.padded("k")[None], self._notes(part)
            for name, x in self.policy.observe(queries, k, notes, scale=scale).items():
                found.setdefault(name, []).append(x.flatten())
        if not found:
            return row
        return row.replaced({name: torch.cat(pieces) for name, pieces in found.items()})

    def _scores(self, q: Tensor, row: Slots, scale: float | None) -> Tensor:
        """Scores (Hkv, width) of a row's slots, −inf where a head has none."""
        pieces = []
        for part, queries in zip(_parts(row), _queries(q, row), strict=True):
            k, notes = part.padded("k")[None], self._notes(part)
            pieces.append(self.policy.score(queries, k, notes, scale=scale).flatten())
        scores = row.replaced({"score": torch.cat(pieces)})
        return scores.padded("score").masked_fill(~row.filled(), -torch.inf)

    def _notes(self, part: Slots) -> Packed:
        return {name: part.padded(name) for name in self.policy.notes}

    def _rows(self) -> list[Slots]:
        """The slots of every row."""
        return [] if self.slots is None else self.slots.rows(len(self.real))

    def view(self) -> tuple[Tensor, Tensor | None]:
        """Keys (B, Hkv, n, D) held after a call, and their validity (B, n) where rows differ."""
        if self.slots is None:
            raise RuntimeError("nothing is held")
        heads = len(self.slots.lengths) // len(self.real)
        valid = None if self.slots.even else self.slots.filled()[::heads]
        return self.slots.padded("k").unflatten(0, (len(self.real), heads)), valid

    def tensors(self) -> list[Tensor]:
        """Keys, values and notes."""
        return [] if self.slots is None else list(self.slots.held.values())

    def _batch(self) -> int:
        return max(len(self.real), len(self.memory))

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        if self.slots is not None:
            rows, kept = self._rows(), indices.tolist()
            self.slots = Slots.joined([rows[b] for b in kept])
            self.real = [self.real[b] for b in kept]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.slots = self._grown = None
        self.real, self._new, self._fresh, self._growing = [], {}, [], {}


def _parts(row: Slots) -> list[Slots]:
    """A row as one part, or head by head where its heads hold different numbers of slots."""
    return [row] if row.even else row.rows(len(row.lengths))


def _queries(q: Tensor, row: Slots) -> list[Tensor]:
    """The queries (1, ·, l, D) that read each part of a row."""
    return [q] if row.even else list(q.chunk(len(row.lengths), 1))


def _kept_mass(q: Tensor, row: Slots, kept: Tensor, scale: float | None, at: int) -> Record:
    """Share of slots kept, and of the last query's attention mass that lies on them."""
    last, k = q[:, :, -1:], row.padded("k")[None]
    real, kept = row.filled()[None, :, None], kept[None, :, None]
    idx = torch.arange(row.width, device=q.device).expand_as(kept)
    _, part = ops.gather(last, k, k, idx, kept, scale=scale, return_lse=True)
    _, whole = ops.gather(last, k, k, idx, real, scale=scale, return_lse=True)
    mass = float(torch.exp(part - whole).clamp_max(1).mean())
    share = float(kept.sum() / real.sum())
    return Record(at, "cache", token_layout(idx, kept, row.width), share, mass)
