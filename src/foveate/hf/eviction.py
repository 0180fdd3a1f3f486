"""The cache layer that drops tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Record, token_layout
from foveate.cache.base import Eviction
from foveate.hf.layers import PolicyLayer, Recorder


class EvictionLayer(PolicyLayer):
    """Keeps the tokens its policy chooses, per kv head; shorter rows are filled up in front."""

    def __init__(self, policy: Eviction) -> None:
        super().__init__(policy)
        self.keys: Any = None
        self.values: Any = None

    def stored(self) -> int:
        """Slots held."""
        return self.keys.shape[2] if self.is_initialized and self.keys.dim() == 4 else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append; the policy acts in `finish`."""
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states)

    def finish(self, q: Tensor, *, scale: float | None, record: Recorder | None, at: int) -> None:
        """Evict, row by row, what is beyond the budget."""
        if q.shape[2] == 1 and not self.policy.evicts_decoding and self.seen > 1:
            return
        batch, heads, total = self.keys.shape[:3]
        every = torch.arange(total, device=q.device)
        rows, changed = [], False
        for b in range(batch):
            real = every if self.valid is None else self.valid[b].nonzero().squeeze(-1)
            own = every[-q.shape[2] :] if self.valid is None else None
            fresh = own if own is not None else _fresh(self.valid, b, q.shape[2])
            slots = real.expand(heads, -1)
            if real.numel() > self.policy.budget and fresh.numel():
                queries = q[b : b + 1, :, fresh - (total - q.shape[2])]
                keys = self.keys[b : b + 1, :, real]
                kept = self.policy.keep(queries, keys, scale=scale)
                if record is not None and q.shape[2] > 1:
                    record(_kept_mass(queries, keys, kept, scale, at))
                slots = real[kept]
            changed = changed or slots.shape[1] < total
            rows.append(slots)
        if changed:
            self._store(rows)

    def _store(self, rows: list[Tensor]) -> None:
        """Keep the given slots of every row, filled up in front to the longest."""
        width = max(r.shape[1] for r in rows)
        fills = [width - r.shape[1] for r in rows]
        at = torch.stack(
            [torch.nn.functional.pad(r, (f, 0)) for r, f in zip(rows, fills, strict=True)]
        )[..., None]
        self.keys = self.keys.gather(2, at.expand(-1, -1, -1, self.keys.shape[3]))
        self.values = self.values.gather(2, at.expand(-1, -1, -1, self.values.shape[3]))
        self.valid = None
        if any(fills):
            slots = torch.arange(width, device=at.device)
            self.valid = slots >= torch.tensor(fills, device=at.device)[:, None]

    def tensors(self) -> list[Tensor]:
        """Keys, values and, with padding, validity."""
        return [*super().tensors(), *([] if self.valid is None else [self.valid])]


def _fresh(valid: Tensor | None, b: int, q_len: int) -> Tensor:
    """Slots of the real tokens among the last `q_len` of a row."""
    if valid is None:
        raise ValueError("validity is needed to tell new tokens from padding")
    start = valid.shape[1] - q_len
    return valid[b, start:].nonzero().squeeze(-1) + start


def _kept_mass(q: Tensor, k: Tensor, kept: Tensor, scale: float | None, at: int) -> Record:
    """Share of tokens kept, and of the last query's attention mass that lies on them."""
    last = q[:, :, -1:]
    idx = kept[None, :, None]
    _, lse = ops.gather(last, k, k, idx, scale=scale, return_lse=True)
    _, dense = ops.attend(last, k, k, scale=scale, return_lse=True)
    mass = float(torch.exp(lse - dense).clamp_max(1).mean())
    share = kept.shape[1] / k.shape[2]
    return Record(at, "cache", token_layout(idx, None, k.shape[2]), share, mass)
