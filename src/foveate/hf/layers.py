"""Cache layers for transformers: they run a cache policy and carry the state of mechanisms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from foveate import ops
from foveate.attention.base import Record, Slot, token_layout
from foveate.cache.base import CachePolicy, Codec, Eviction, Packed

Recorder = Callable[[Record], None]
Tables = Callable[[Tensor], tuple[Tensor, Tensor]]


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
        held = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in self.tensors()}
        return sum(s.nbytes() for s in held.values())

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


class FullLayer(Stateful, DynamicLayer):
    """Stores every token."""


class SlidingLayer(Stateful, DynamicSlidingWindowLayer):
    """Stores the model's own sliding window."""


class PolicyLayer(Stateful, DynamicLayer):
    """A layer whose stored tokens may differ from the tokens seen.

    `update` returns what the call attends to; `finish`, called after the attention of the call,
    brings the store into its lasting form.
    """

    is_croppable = False
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def stored(self) -> int:
        """Tokens a call would get besides its own."""
        raise NotImplementedError

    def admit(self, valid: Tensor | None, batch: int, q_len: int) -> Tensor | None:
        """Validity (B, stored + Lq) of what `update` returned; valid is that of the new tokens."""
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

    def crop(self, tokens_to_remove: int) -> None:
        """Only removing nothing is possible: what was dropped cannot come back."""
        if tokens_to_remove:
            raise ValueError(
                f"a cache with policy {type(self).__name__} cannot give back "
                f"{abs(tokens_to_remove)} tokens: speculative and prompt-lookup decoding need a "
                "cache that keeps every token (attach without the cache slot)"
            )


class EvictionLayer(PolicyLayer):
    """Keeps the tokens its policy chooses, per kv head; shorter rows are filled up in front."""

    def __init__(self, policy: Eviction) -> None:
        super().__init__()
        self.policy = policy
        self.keys: Any = None
        self.values: Any = None
        self.valid: Tensor | None = None

    def stored(self) -> int:
        """Slots held."""
        return self.keys.shape[2] if self.is_initialized and self.keys.dim() == 4 else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append; the policy acts in `finish`."""
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states)

    def admit(self, valid: Tensor | None, batch: int, q_len: int) -> Tensor | None:
        """Remember which of the new tokens are real."""
        if self.valid is None and valid is None:
            return None
        before = self.stored() - q_len
        past = torch.ones(batch, before, dtype=torch.bool) if self.valid is None else self.valid
        new = torch.ones(batch, q_len, dtype=torch.bool) if valid is None else valid
        self.valid = torch.cat([past.to(new.device), new], 1)
        return self.valid

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
                if record is not None:
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

    def _select(self, indices: Tensor) -> None:
        super()._select(indices)
        if self.valid is not None:
            self.valid = self.valid[indices.to(self.valid.device)]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.valid = None


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
    return Record(at, "decode", token_layout(idx, None, k.shape[2]), share, mass)


class CodecLayer(PolicyLayer):
    """Stores tokens as its codec packs them; reading unpacks all of them.

    Rotary positions are held by the first such layer of a cache, `owner`, for all of them.
    """

    def __init__(self, codec: Codec, owner: CodecLayer | None, tables: Tables | None) -> None:
        super().__init__()
        self.codec, self.owner, self.tables = codec, owner, tables
        self.packed: Packed = {}
        self.state: Packed = {}
        self.kept: Packed = {}
        self.positions: Tensor | None = None
        self.hidden: Tensor | None = None
        self.valid: Tensor | None = None
        self._new: tuple[Tensor, Tensor] | None = None
        self._rope: tuple[Tensor, Tensor] | None = None

    def stored(self) -> int:
        """Every token seen."""
        return self.seen

    def see(self, hidden: Tensor | None, positions: Tensor, rows: int) -> None:
        """Take the layer's input and the positions (B|1, Lq) of the call that begins."""
        self.hidden = hidden
        if self.owner is None and self.codec.pre_rope and self.tables is not None:
            new = positions.to(torch.int32).expand(rows, -1)
            past = self.positions
            self.positions = new if past is None else torch.cat([past, new], 1)
            self._rope = self.tables(self.positions)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Unpack what is stored and append the new tokens as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = (key_states, value_states)
        past = self.seen
        self.seen += key_states.shape[2]
        if not past:
            return key_states, value_states
        k, v = self.codec.decode(self.packed, state=self.state)
        if (rope := self._rotation(0, past)) is not None:
            k = ops.rope(k, *rope)
        k, v = k.to(key_states.dtype), v.to(value_states.dtype)
        if self.kept:
            at = self.kept["slot"][:, None, :, None].long()
            real = at >= 0
            for x, exact in ((k, self.kept["k"]), (v, self.kept["v"])):
                where = at.clamp_min(0).expand_as(exact)
                x.scatter_(2, where, torch.where(real, exact, x.gather(2, where)))
        return torch.cat([k, key_states], 2), torch.cat([v, value_states], 2)

    def _rotation(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Rotary tables of the positions start … stop of the sequence."""
        rope = (self.owner or self)._rope
        return None if rope is None else (rope[0][:, start:stop], rope[1][:, start:stop])

    def admit(self, valid: Tensor | None, batch: int, q_len: int) -> Tensor | None:
        """Remember which of the new tokens are real."""
        if self.valid is None and valid is None:
            return None
        before = self.seen - q_len
        past = torch.ones(batch, before, dtype=torch.bool) if self.valid is None else self.valid
        new = torch.ones(batch, q_len, dtype=torch.bool) if valid is None else valid
        self.valid = torch.cat([past.to(new.device), new], 1)
        return self.valid

    def finish(self, q: Tensor, *, scale: float | None, record: Recorder | None, at: int) -> None:
        """Pack the new tokens."""
        if self._new is None:
            return
        k, v = self._new
        self._new = None
        new = k.shape[2]
        valid = None if self.valid is None else self.valid[:, -new:]
        if new > 1 and self.hidden is not None and not self.kept:
            self._keep_exact(k, v, self.codec.exact(self.hidden, valid))
        self.hidden = None
        if (rope := self._rotation(self.seen - new, self.seen)) is not None:
            k = ops.unrope(k.float(), *rope)
        packed = self.codec.encode(k, v, valid=valid, state=self.state)
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
        if self.valid is not None:
            self.valid = self.valid[indices.to(self.valid.device)]
        if self.positions is not None:
            self.positions = self.positions[indices.to(self.positions.device)]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Follow beam search."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select(torch.arange(self._batch()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._select(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.packed, self.state, self.kept = {}, {}, {}
        self.positions = self.valid = self.hidden = self._new = self._rope = None


def layer_for(
    policy: CachePolicy | None, old: Any, owner: CodecLayer | None, tables: Tables | None
) -> Any:
    """The layer that takes the place of `old`, a stock dynamic layer, with its tokens.

    Raises ValueError where the old layer cannot be taken over.
    """
    if type(old) is DynamicSlidingWindowLayer:
        new: Any = SlidingLayer(old.sliding_window)
    elif type(old) is not DynamicLayer:
        raise ValueError(
            f"attach works with dynamic caches, got a cache layer {type(old).__name__}: leave "
            "past_key_values and cache_implementation alone, or pass a DynamicCache"
        )
    elif policy is None:
        new = FullLayer()
    elif isinstance(policy, Eviction):
        new = EvictionLayer(policy)
    elif isinstance(policy, Codec):
        if old.get_seq_length():
            raise ValueError(
                f"{policy.card.name} encodes tokens as they come: it cannot take over a cache "
                f"that already holds {old.get_seq_length()} tokens; start with an empty one"
            )
        return CodecLayer(policy, owner, tables)
    else:
        raise TypeError(f"{policy!r} is no cache policy")
    state = {k: v for k, v in vars(old).items() if k not in ("memory", "policy")}
    vars(new).update(state)
    if isinstance(new, EvictionLayer):
        new.seen = old.get_seq_length()
    return new
