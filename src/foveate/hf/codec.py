"""The cache layer that stores tokens in another form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Tables
from foveate.cache.base import Codec, Packed
from foveate.hf.layers import PolicyLayer, Recorder


class CodecLayer(PolicyLayer):
    """Stores tokens as its codec packs them; reading unpacks all of them.

    Rotary positions are held by the first such layer of a cache, `owner`, for all of them.
    """

    def __init__(self, codec: Codec, owner: CodecLayer | None, tables: Tables | None) -> None:
        super().__init__(codec)
        self.owner, self.tables = owner, tables
        self.packed: Packed = {}
        self.state: Packed = {}
        self.kept: Packed = {}
        self.positions: Tensor | None = None
        self.hidden: Tensor | None = None
        self._new: tuple[Tensor, Tensor] | None = None
        self._rope: tuple[Tensor, Tensor] | None = None

    def stored(self) -> int:
        """Every token seen."""
        return self.seen

    def locate(self, positions: Tensor, rows: int) -> None:
        """Take the positions (B|1, Lq) of the call that begins; only the owner is told."""
        if self.tables is not None:
            past = [] if self.positions is None else [self.positions[:, : self.seen]]
            new = positions.to(torch.int32).expand(rows, -1)
            self.positions = torch.cat([*past, new], 1)
            self._rope = self.tables(self.positions)

    def forget(self) -> None:
        """Drop what only the call that ends needed."""
        self.hidden = self._rope = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Unpack what is stored and append the new tokens as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        owner = self.owner or self
        if self._new is not None or (owner.tables is not None and owner._rope is None):
            raise self.unattached()
        self._new = (key_states, value_states)
        past = self.seen
        self.seen += key_states.shape[2]
        if not past:
            return key_states, value_states
        k, v = self.policy.decode(self.packed, state=self.state)
        if (rope := self._rotation(0, past)) is not None:
            k = ops.rope(k, *rope)
        k, v = k.to(key_states.dtype), v.to(value_states.dtype)
        if self.kept:
            row, nth = (self.kept["slot"] >= 0).nonzero(as_tuple=True)
            slot = self.kept["slot"][row, nth].long()
            for x, exact in ((k, self.kept["k"]), (v, self.kept["v"])):
                x[row, :, slot] = exact[row, :, nth]
        return torch.cat([k, key_states], 2), torch.cat([v, value_states], 2)

    def _rotation(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Rotary tables of the positions start … stop of the sequence."""
        rope = (self.owner or self)._rope
        return None if rope is None else (rope[0][:, start:stop], rope[1][:, start:stop])

    def finish(self, q: Tensor, *, scale: float | None, record: Recorder | None, at: int) -> None:
        """Pack the new tokens."""
        if self._new is None:
            return
        k, v = self._new
        self._new = None
        new = k.shape[2]
        valid = None if self.valid is None else self.valid[:, -new:]
        if new > 1 and self.hidden is not None and not self.kept:
            self._keep_exact(k, v, self.policy.exact(self.hidden, valid))
        self.hidden = None
        if (rope := self._rotation(self.seen - new, self.seen)) is not None:
            k = ops.unrope(k.float(), *rope)
        packed = self.policy.encode(k, v, valid=valid, state=self.state)
        if self.packed:
            packed = {n: torch.cat([self.packed[n], x], 1) for n, x in packed.items()}
        self.packed = packed

    def _keep_exact(self, k: Tensor, v: Tensor, chosen: Tensor | None) -> None:
        """Store the chosen tokens (B, Lq) in full precision too."""
        if chosen is None or not bool(chosen.any()):
            return
        width = int(chosen.sum(1).max())
        order = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        real = chosen.gather(1, order)
        start = self.seen - k.shape[2]
        at = order[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        slot = torch.where(real, order + start, -1).to(torch.int32)
        self.kept = {"slot": slot, "k": k.gather(2, at), "v": v.gather(2, at)}

    def tensors(self) -> list[Tensor]:
        """Packed tokens, exact tokens, statistics and positions."""
        own = [x for x in (self.positions, self.valid) if x is not None]
        return [*self.packed.values(), *self.state.values(), *self.kept.values(), *own]

    def _batch(self) -> int:
        return next((x.shape[0] for x in self.packed.values()), len(self.memory))

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        for held in (self.packed, self.state, self.kept):
            for name, x in held.items():
                held[name] = x[indices.to(x.device)]
        if self.positions is not None:
            self.positions = self.positions[indices.to(self.positions.device)]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.packed, self.state, self.kept = {}, {}, {}
        self.positions = self.hidden = self._new = self._rope = None
