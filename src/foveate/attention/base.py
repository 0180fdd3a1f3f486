"""Base classes of attention mechanisms: when they act, padding, state, and what they share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from foveate import ops
from foveate.attention._call import (
    Call,
    Memory,
    Record,
    Result,
    Shared,
    Slot,
    Tables,
    measure,
    phase_of,
    rows_of,
)
from foveate.ops import BlockLayout, Mask
from foveate.registry import Card

__all__ = [
    "Attention",
    "BlockSparse",
    "Call",
    "IndexReuse",
    "Memory",
    "Pattern",
    "Record",
    "Result",
    "Shared",
    "Slot",
    "Tables",
    "TokenSparse",
    "attend_span",
    "dense_result",
    "phase_of",
    "token_layout",
]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """A mechanism `(q, k, v, *, causal, mask, scale, call) -> out`; its fields are its options.

    Where it does not act (below `min_len` keys, in `dense_layers`, in the first `dense_steps`
    denoising steps, in a phase that is not on its card) it is dense attention. Padded rows are run
    one by one without their padding, so that a row never depends on its batch mates; so are all
    rows of a mechanism that keeps state. Some read what all rows follow (`reads_shared`).
    """

    card: ClassVar[Card]
    stateful: ClassVar[bool] = False
    reads_shared: ClassVar[bool] = False

    min_len: int = 0
    dense_layers: tuple[int, ...] = ()
    dense_steps: int = 0

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        mask: Mask | None = None,
        scale: float | None = None,
        call: Call | None = None,
    ) -> Tensor:
        """Attend: q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) -> (B, Hq, Lq, Dv)."""
        shape = ops.check_qkv(q, k, v)
        call = Call(phase=phase_of(shape.q_len, shape.k_len)) if call is None else call
        call = dataclasses.replace(call, causal=causal, mask=mask, scale=scale)
        padded = call.valid is not None and not bool(call.valid.all())
        if not padded and not (self.stateful and self.acts(shape.k_len, call)):
            call.valid = None
            return self._run(q, k, v, call)
        if not padded and shape.batch == 1:
            return self._run(q, k, v, call.row(0, 1))
        out = q.new_zeros(*q.shape[:3], shape.v_dim)
        for b, at, row in rows_of(call, shape.batch, shape.q_len):
            row.mask = None if mask is None else mask.take(b, at.slots)
            out[b, :, at.rows] = self._run(at.queries(q), at.keys(k), at.keys(v), row)[0]
        return out

    def after_prefill(self, q: Tensor, k: Tensor, call: Call) -> None:
        """Show a stateful decode mechanism every row's last query (B, Hq, 1, D) and its keys."""
        for b in range(q.shape[0]):
            real = slice(None) if call.valid is None else call.valid[b].nonzero().squeeze(-1)
            keys = k[b : b + 1, :, real]
            if keys.shape[2]:
                row = call.row(b, q.shape[0])
                self.prefilled(q[b : b + 1], keys, row)

    def prefilled(self, q: Tensor, k: Tensor, call: Call) -> None:
        """Prepare `call.state` from one row's last query and keys; nothing by default."""

    def _run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """One call without padding: the mechanism where it acts, dense attention elsewhere."""
        if not self.acts(k.shape[2], call):
            return dense_result(q, k, v, call).out
        direction = "causal" if call.causal else "noncausal"
        if all(not pattern.startswith(direction) for pattern in self.card.patterns):
            made_for = "noncausal" if call.causal else "causal"
            raise ValueError(
                f"{self.card.name} is defined for {made_for} attention only, "
                f"got causal={call.causal}"
            )
        result = self.compute(q, k, v, call)
        if call.record is not None:
            call.record(measure(q, k, v, call, result))
        return result.out

    def acts(self, k_len: int, call: Call) -> bool:
        """Whether the mechanism itself runs, not dense attention in its place."""
        here = call.layer not in {x % call.layers for x in self.dense_layers}
        now = call.step >= self.dense_steps and call.phase in self.card.phases
        return here and now and k_len >= self.min_len

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """The mechanism proper; lse and layout are wanted when `call.record` is set."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BlockSparse(Attention):
    """Exact attention over the key blocks that `select` chooses."""

    block: int = 128

    def __post_init__(self) -> None:
        ops.check_block("block", self.block)

    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout | None:
        """The blocks to read, None for all of them."""
        raise NotImplementedError

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Block-sparse attention over the selection."""
        layout = self.select(q, k, call)
        if layout is None:
            return dense_result(q, k, v, call)
        out, lse = ops.block_sparse(q, k, v, layout, return_lse=True, **call.options())
        return Result(out, lse, layout)


def dense_result(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    """Dense attention as a mechanism's result."""
    return Result(ops.attend(q, k, v, **call.options()))


def attend_span(
    q: Tensor, k: Tensor, v: Tensor, lo: int, hi: int, call: Call
) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries, the last positions of k, over its keys lo … hi - 1 alone."""
    first, options = k.shape[2] - q.shape[2], call.options()
    at = torch.arange(first, k.shape[2], device=q.device)
    if call.mask is not None:
        options |= {"q_pos": at, "k_pos": torch.arange(lo, hi, device=q.device)}
    elif call.causal and hi > first + 1:
        options["q_pos"] = at - lo
    else:
        options["causal"] = False
    return ops.attend(q, k[:, :, lo:hi], v[:, :, lo:hi], return_lse=True, **options)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, valid: Tensor | None, call: Call
) -> Result:
    """Attention over token lists; the call's mask rules out listed tokens."""
    if call.mask is not None:
        idx, seen = _visible_tokens(call.mask, idx, k.shape[2])
        valid = seen if valid is None else valid.expand_as(seen) & seen
    options: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap}
    out, lse = ops.gather(q, k, v, idx, valid, return_lse=True, **options)
    layout = token_layout(idx, valid, k.shape[2]) if call.record is not None else None
    return Result(out, lse, layout)


def token_layout(idx: Tensor, valid: Tensor | None, k_len: int, width: int = 1) -> BlockLayout:
    """The layout of lists (B, H, Lq, m) of blocks of `width` keys, one list per query."""
    last = -(-k_len // width)
    order = (idx if valid is None else idx.masked_fill(~valid, last)).sort(-1).values
    counts = (order < last).sum(-1, dtype=torch.int32)
    return BlockLayout(order.clamp_max(last - 1).int(), counts, (1, width), (idx.shape[2], k_len))


@dataclass(frozen=True, kw_only=True)
class TokenSparse(Attention):
    """Exact attention of each query over the tokens that `select` lists for it."""

    def select(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor | None] | None:
        """Token lists idx (B, 1|Hkv|Hq, Lq, m) and their validity, None for all tokens."""
        raise NotImplementedError

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Gathered attention over the selection; a mask rules out listed tokens."""
        chosen = self.select(q, k, call)
        if chosen is None:
            return dense_result(q, k, v, call)
        return _gathered(q, k, v, *chosen, call)


def _visible_tokens(mask: Mask, idx: Tensor, k_len: int) -> tuple[Tensor, Tensor]:
    """Lists with a row per head that the mask tells apart, and which of their tokens it shows."""
    if mask.heads > idx.shape[1]:
        idx = idx.repeat_interleave(mask.heads // idx.shape[1], 1)
    b = torch.arange(idx.shape[0], device=idx.device).view(-1, 1, 1, 1)
    h = torch.arange(idx.shape[1], device=idx.device).view(1, -1, 1, 1)
    q_pos = torch.arange(idx.shape[2], device=idx.device) + k_len - idx.shape[2]
    return idx, mask(b, h, q_pos.view(1, 1, -1, 1), idx).expand_as(idx)


@dataclass(frozen=True, kw_only=True)
class Pattern(Attention):
    """Attention under a mask that depends on positions alone."""

    per_layer: ClassVar[bool] = False

    block: int = 64

    def __post_init__(self) -> None:
        ops.check_block("block", self.block)

    def mask(self, q_len: int, k_len: int, call: Call) -> Mask:
        """The pattern; causality is added to it. May read the layer if the class is `per_layer`."""
        raise NotImplementedError

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Attention over the blocks the pattern touches, the pattern applied inside them."""
        lq, lk = q.shape[2], k.shape[2]
        layer = (call.layer, call.layers) if self.per_layer else (0, 1)
        pattern, options = self.mask(lq, lk, call), call.options()
        if _covers(pattern, lq, lk):
            return dense_result(q, k, v, call)
        if lq == 1 and pattern.heads == pattern.batch == 1:
            return _gathered(q, k, v, _tokens_of(self, lk, call.causal, *layer), None, call)
        layout, options["mask"] = _layout_of(self, lq, lk, call.causal, *layer), pattern
        if call.mask is not None:
            # The layout's `partial` knows the pattern only; another mask may cut any block.
            layout = dataclasses.replace(layout, partial=None)
            options["mask"] = pattern & call.mask
        out, lse = ops.block_sparse(q, k, v, layout, return_lse=True, **options)
        return Result(out, lse, layout)


def _covers(pattern: Mask, q_len: int, k_len: int) -> bool:
    """Whether a mask surely hides nothing."""
    ends = (max(k_len - q_len, 0), k_len - 1, 0, k_len - 1)
    _, every = pattern.bounds(*pattern.axes(torch.device("cpu")), *map(torch.tensor, ends))
    return bool(every.all())


def _rule(pattern: Pattern, q_len: int, k_len: int, causal: bool, layer: int, layers: int) -> Mask:
    mask = pattern.mask(q_len, k_len, Call(layer=layer, layers=layers))
    return mask & ops.causal() if causal else mask


@lru_cache(maxsize=64)
def _layout_of(pattern: Pattern, q_len: int, k_len: int, *rest: Any) -> BlockLayout:
    """The layout of a pattern: made once for all layers that share it."""
    block = (min(pattern.block, q_len), pattern.block)
    return _rule(pattern, q_len, k_len, *rest).to_layout(q_len, k_len, block)


@lru_cache(maxsize=64)
def _tokens_of(pattern: Pattern, k_len: int, *rest: Any) -> Tensor:
    """The tokens the last query sees (1, 1, 1, m)."""
    seen = _rule(pattern, 1, k_len, *rest).to_dense(1, k_len)
    return seen.view(-1).nonzero().view(1, 1, 1, -1)


@dataclass(frozen=True, kw_only=True)
class IndexReuse(Attention):
    """Attention that chooses tokens now and then and reads the same ones until it chooses again.

    A call that is `due` lets `choose` write the row's state; what is not due reads the tokens that
    `recall` takes from it. Calls of several queries are always due. With `dense_when_due` a
    choosing call itself attends to everything. Subclasses differ in the rule (layers, steps, or
    how far the query has `turned`), in the scope of the lists (per query head, kv head or layer)
    and in what is always kept.
    """

    stateful: ClassVar[bool] = True
    dense_when_due: ClassVar[bool] = True

    def due(self, q: Tensor, k_len: int, call: Call) -> bool:
        """Whether this call of one query chooses."""
        raise NotImplementedError

    def choose(self, q: Tensor, k: Tensor, call: Call) -> None:
        """Keep in `call.state` what later calls will read; called when due."""
        raise NotImplementedError

    def recall(self, k_len: int, call: Call) -> Tensor:
        """Tokens to read now, (1, 1|Hkv|Hq, m)."""
        raise NotImplementedError

    def turned(self, query: Tensor, threshold: float, call: Call) -> bool:
        """Whether a query's cosine with the one that chose last, `query`, is below a threshold."""
        before = call.state[call.layer]["query"]
        return float(cosine_similarity(query.flatten(), before.flatten(), dim=0)) < threshold

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Choose when due; attend to everything then (`dense_when_due`), else to the choice."""
        due = q.shape[2] > 1 or self.due(q, k.shape[2], call)
        if due:
            self.choose(q, k, call)
        if due and self.dense_when_due:
            return dense_result(q, k, v, call)
        return self.read(q, k, v, call)

    def read(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Gathered attention over the tokens of the choice."""
        idx = self.recall(k.shape[2], call)[:, :, None]
        if idx.shape[3] >= k.shape[2]:
            return dense_result(q, k, v, call)
        return _gathered(q, k, v, idx, None, call)
