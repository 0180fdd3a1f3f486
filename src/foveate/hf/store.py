"""The cache layer of policies that hold rows in a form of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.cache.base import Store
from foveate.hf.layers import PolicyLayer, Recorder, real_tokens


class StoreLayer(PolicyLayer):
    """Holds the tokens of every row without its padding; `attend` reads them.

    `update` returns the new tokens alone.
    """

    def __init__(self, policy: Store) -> None:
        super().__init__(policy)
        self.rows: list[Any] = []
        self._new: tuple[Tensor, Tensor] | None = None
        self._fresh: list[Tensor | slice] = []

    def stored(self) -> int:
        """Nothing comes with the new tokens."""
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The new tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.expect()
        self._new = key_states, value_states
        self.seen += key_states.shape[2]
        return self._new

    def admit(self, valid: Tensor | None, batch: int, q_len: int) -> Tensor | None:
        """Validity of the new tokens."""
        self._fresh = real_tokens(valid, batch)
        return valid

    def attend(self, q: Tensor, *, scale: float | None, softcap: float | None) -> Tensor:
        """Attention (B, Hq, Lq, Dv) of the call's queries over all tokens of their rows."""
        if self._new is None:
            raise RuntimeError("attend comes after update")
        out = q.new_zeros(*q.shape[:3], self._new[1].shape[3])
        for b, row in enumerate(self.rows):
            at = self._fresh[b]
            queries, (k, v) = q[b : b + 1, :, at], self._own(b)
            if queries.shape[2]:
                found = self.policy.attend(queries, row, k, v, scale=scale, softcap=softcap)
                out[b, :, at] = found[0]
        return out

    def finish(self, q: Tensor, *, scale: float | None, record: Recorder | None, at: int) -> None:
        """Take the new tokens in, those that the policy chooses."""
        if self._new is None:
            return
        own = [self._chosen(b, q, scale) for b in range(q.shape[0])]
        held = self.rows or [self.policy.empty(*pair, layer=at) for pair in own]
        self.rows = [self.policy.extended(row, *pair) for row, pair in zip(held, own, strict=True)]
        self._new = None

    def _chosen(self, b: int, q: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Keys and values (1, Hkv, m, ·) of a row's new tokens that are to be held."""
        k, v = self._own(b)
        at = self.policy.chosen(q[b : b + 1, :, self._fresh[b]], k, scale=scale)
        if at is None:
            return k, v
        k, v = (x.gather(2, at[None, ..., None].expand(1, -1, -1, x.shape[3])) for x in (k, v))
        return k, v

    def _own(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, Hkv, n, ·) of a row's new tokens."""
        if self._new is None:
            raise RuntimeError("nothing came")
        k, v = (x[b : b + 1, :, self._fresh[b]] for x in self._new)
        return k, v

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        return [x for row in self.rows for x in self.policy.tensors(row)]

    def _batch(self) -> int:
        return max(len(self.rows), len(self.memory))

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        if self.rows:
            self.rows = [self.rows[b] for b in indices.tolist()]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rows, self._new, self._fresh = [], None, []
