"""Cache layers for transformers: they run a cache policy and carry the state of mechanisms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from foveate.attention.base import Record, Slot
from foveate.cache.base import CachePolicy

Recorder = Callable[[Record], None]
# A cache may hold this part of its tokens more than it has.
_ROOM = 64


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    held = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    return sum(s.nbytes() for s in held.values())


class Stateful:
    """What every layer of an attached model adds: mechanism state that follows the batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory: list[Slot] = []

    def tensors(self) -> list[Tensor]:
        """Everything the layer holds that follows the batch on axis 0, for counting bytes."""
        keys, values = getattr(self, "keys", None), getattr(self, "values", None)
        return [x for x in (keys, values) if x is not None]

    def nbytes(self) -> int:
        """Bytes of the storages really held."""
        return storage_bytes(self.tensors())

    def _select(self, indices: Tensor) -> None:
        """Reorder what the base class does not know of."""
        rows = indices.tolist()
        if self.memory:
            self.memory[:] = [copy.copy(self.memory[i]) for i in rows]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Follow beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(self._batch()).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._select(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def _batch(self) -> int:
        keys = getattr(self, "keys", None)
        return max(len(self.memory), 0 if keys is None or keys.dim() != 4 else keys.shape[0])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self.memory.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; state that was chosen with them is dropped too."""
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if tokens_to_remove:
            self.memory.clear()


class Growing:
    """A tensor that grows along an axis in place as long as its storage has room.

    One part in `_ROOM` of the storage is kept free, so that growing by a token seldom copies all.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.held: Tensor | None = None
        self.storage: Tensor | None = None

    def appended(self, held: Tensor, new: Tensor) -> Tensor:
        """`held` followed by `new`; copies `held` unless it is what was returned last.

        The first tokens are held without room, and where gradients are wanted nothing is written.
        """
        start, count = held.shape[self.axis], new.shape[self.axis]
        if not start or torch.is_grad_enabled():
            return torch.cat([held, new], self.axis)
        storage, stop = self.storage, start + count
        # What inference mode made can be written to there only.
        ours = storage is not None and storage.is_inference() == torch.is_inference_mode_enabled()
        free = storage is not None and stop <= storage.shape[self.axis]
        if storage is None or not ours or held is not self.held or not free:
            shape = list(held.shape)
            shape[self.axis] = stop + stop // _ROOM
            storage = held.new_empty(shape)
            storage.narrow(self.axis, 0, start).copy_(held)
        storage.narrow(self.axis, start, count).copy_(new)
        self.storage, self.held = storage, storage.narrow(self.axis, 0, stop)
        return self.held


class FullLayer(Stateful, DynamicLayer):
    """Stores every token; copies of a layer may share what they hold and go on apart."""

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grown = Growing(2), Growing(2)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append; returns all keys and values."""
        if not self.get_seq_length():
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self._grown
        self.keys = keys.appended(self.keys, key_states)
        self.values = values.appended(self.values, value_states)
        return self.keys, self.values


class SlidingLayer(Stateful, DynamicSlidingWindowLayer):
    """Stores the model's own sliding window."""


class PolicyLayer(Stateful, DynamicLayer):
    """A layer whose stored tokens may differ from the tokens seen.

    `update` returns what the call attends to; `finish`, called after the attention of the call,
    brings the store into its lasting form.
    """

    is_croppable = False
    is_compileable = False

    def __init__(self, policy: CachePolicy) -> None:
        super().__init__()
        self.policy: Any = policy
        self.seen = 0
        self.valid: Tensor | None = None
        self.awaited = False

    @property
    def reads(self) -> bool:
        """Whether `attend` reads what is stored, and `update` returns the new tokens alone."""
        return bool(self.policy.read_densely)

    def await_call(self) -> None:
        """An attached model is about to run: the next `update` will be followed by `finish`."""
        self.awaited = True

    def expect(self) -> None:
        """ValueError unless an attached model runs: without one no call is ever finished."""
        if not self.awaited:
            raise self.unattached()
        self.awaited = False

    def unattached(self) -> ValueError:
        """The refusal of a call that no attached model makes."""
        return ValueError(
            f"this cache was filled under {self.policy.card.name}, which needs the model to "
            "be attached: use it inside the attach block only, or start with an empty cache"
        )

    def stored(self) -> int:
        """Tokens a call would get besides its own."""
        raise NotImplementedError

    def admit(self, valid: Tensor | None, batch: int, q_len: int) -> Tensor | None:
        """Validity (B, stored) of what `update` returned; valid (B, Lq) is that of the new."""
        if self.valid is None and valid is None:
            return None
        before = self.stored() - q_len
        past = torch.ones(batch, before, dtype=torch.bool) if self.valid is None else self.valid
        new = torch.ones(batch, q_len, dtype=torch.bool) if valid is None else valid
        self.valid = torch.cat([past.to(new.device), new], 1)
        return self.valid

    def attend(self, q: Tensor, *, scale: float | None, softcap: float | None) -> Tensor:
        """Attention (B, Hq, Lq, Dv) of the call's queries over all tokens of their rows."""
        raise NotImplementedError

    def finish(self, q: Tensor, *, scale: float | None, record: Recorder | None, at: int) -> None:
        """End the call of queries q in layer `at`."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys the next `update` returns, and the position of the first."""
        return self.stored() + query_length, self.seen - self.stored()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = 0
        self.valid = None

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        if self.valid is not None:
            self.valid = self.valid[indices.to(self.valid.device)]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Follow beam search."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select(torch.arange(self._batch()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._select(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Only removing nothing is possible: what was dropped cannot come back."""
        if tokens_to_remove:
            raise ValueError(
                f"a cache with policy {self.policy.card.name} cannot give back "
                f"{abs(tokens_to_remove)} tokens: speculative and prompt-lookup decoding need a "
                "cache that keeps every token (attach without the cache slot)"
            )


def real_tokens(valid: Tensor | None, batch: int) -> list[Tensor | slice]:
    """Where the real ones among the new tokens of every row lie; valid (B, l), None: everywhere."""
    if valid is None:
        return [slice(None)] * batch
    return [row.nonzero().squeeze(-1) for row in valid]
