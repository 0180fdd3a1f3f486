"""TokenSelect: heads vote for tokens by their products with the query (2024, paper 250)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from foveate import ops
from foveate.attention.base import Call, IndexReuse, Result, attend_span
from foveate.ops import BlockLayout
from foveate.registry import Card, register


@register(
    Card(
        name="token_select",
        title="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via "
        "Dynamic Token-Level KV Cache Selection",
        claim="few tokens, voted for by all heads and numbered anew, serve far beyond the trained "
        "length; a choice lasts while the query hardly turns",
        kind="attention",
        family="decode",
        year=2024,
        paper=250,
        selection_causal=False,
        cost="per choice n·Hkv·D and per query sinks + budget + window tokens, instead of n",
        decoding="full KV cache, the keys before rotation once more, the chosen tokens",
        confidence="checked against the released code, but query heads vote on the keys of their "
        "own kv head; choices are reused in decoding only",
        small={"sinks": 4, "budget": 16, "window": 16, "chunk": 8, "reindex": False},
        full={"budget": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class TokenSelect(IndexReuse):
    """Reads the first `sinks`, the last `window`, and the `budget` others with the most votes.

    Each query head spreads one vote by a softmax (`score_scale`, with no 1/sqrt(D)) over the keys
    as if all lay equally far; `pool` takes the maximum over neighbours (odd, 0 for none). With
    `reindex` the tokens read are numbered anew, so that positions stay below their number. A
    prefill chooses for `chunk` queries together, by their mean; decoding chooses anew once the
    cosine of its query with that of the last choice is below `threshold`, or after `max_reuse`
    steps (None: no limit; tokens that left the window since then are not read). Keys without
    rotary tables are taken as they are.
    """

    dense_when_due: ClassVar[bool] = False

    budget: int = 2048
    sinks: int = 128
    window: int = 512
    chunk: int = 512
    threshold: float = 0.9
    max_reuse: int | None = None
    pool: int = 0
    score_scale: float = 1.0
    reindex: bool = True

    def __post_init__(self) -> None:
        for name in ("budget", "window", "chunk"):
            ops.check_block(name, getattr(self, name))
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if self.chunk > self.window:
            raise ValueError(f"chunk must be at most the window {self.window}, got {self.chunk}")
        if self.max_reuse is not None and not 1 <= self.max_reuse <= self.window:
            raise ValueError(
                f"max_reuse must be at least 1 and at most the window {self.window}, or None; "
                f"got {self.max_reuse}"
            )
        if self.pool < 0 or (self.pool and self.pool % 2 == 0):
            raise ValueError(f"pool must be odd, or 0 for none, got {self.pool}")
        if self.score_scale <= 0:
            raise ValueError(f"score_scale must be above 0, got {self.score_scale}")

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Chunk by chunk, cut on absolute positions."""
        start, end = k.shape[2] - q.shape[2], k.shape[2]
        held = call.state.setdefault(call.layer, {})
        if start == 0:
            held.clear()
        cuts = range((start // self.chunk + 1) * self.chunk, end, self.chunk)
        parts = [
            super(TokenSelect, self).compute(
                q[:, :, lo - start : hi - start], k[:, :, :hi], v[:, :, :hi], call
            )
            for lo, hi in pairwise((start, *cuts, end))
        ]
        return parts[0] if len(parts) == 1 else _joined(parts, (end - start, end))

    def due(self, q: Tensor, k_len: int, call: Call) -> bool:
        """When the query has turned, or the state does not know the step before."""
        held = call.state[call.layer]
        if held.get("k_len") != k_len - 1 or held["age"] == self.max_reuse:
            return True
        return self.turned(self._mean(q, k_len, call), self.threshold, call)

    def choose(self, q: Tensor, k: Tensor, call: Call) -> None:
        """List the winners of the vote between the sinks and the window."""
        end = k.shape[2] - self.window
        if end <= self.sinks + self.budget:
            return
        query = self._mean(q, k.shape[2], call)
        logits = [ops.grouped_logits(query, x, self.score_scale) for x in self._plain(k, end, call)]
        votes = torch.softmax(torch.cat(logits, -1)[:, :, 0], -1).sum(1)
        if self.pool:
            votes = max_pool1d(votes, self.pool, 1, self.pool // 2)
        best = votes[0].topk(self.budget).indices.sort().values + self.sinks
        idx = torch.cat((torch.arange(self.sinks, device=k.device), best))
        call.state[call.layer].update(query=query, idx=idx, far=None, age=0)

    def read(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """The chosen tokens and the window, each on its own, and both merged."""
        n, lq, held, options = k.shape[2], q.shape[2], call.state[call.layer], call.options()
        start = n - self.window
        if start <= self.sinks + self.budget:
            out, lse = ops.attend(q, k, v, return_lse=True, **options)
            return Result(out, lse, self._layout(torch.arange(n), lq, n, call))
        idx = held["idx"]
        if held["far"] is None:
            held["far"] = self._numbered(k, idx, call), v[:, :, idx]
        held.update(k_len=n, age=held["age"] + 1)
        recent = torch.arange(start, n, device=q.device)
        if call.mask is not None:
            options |= {"q_pos": recent[-lq:], "k_pos": idx}
        last = self._last(q, n, idx.numel() + self.window, call)
        options["causal"] = False
        far = ops.attend(last, *held["far"], return_lse=True, **options)
        near = attend_span(q, k, v, start, n, call)
        layout = self._layout(torch.cat((idx, recent)), lq, n, call)
        return Result(*ops.merge((far, near)), layout)

    def _mean(self, q: Tensor, k_len: int, call: Call) -> Tensor:
        """Mean (1, Hq, 1, D) of queries turned so that every candidate lies `window` before."""
        at = torch.arange(q.shape[2], device=q.device) + self.window
        return _turned(q.float(), k_len, slice(-q.shape[2], None), at, call).mean(2, keepdim=True)

    def _plain(self, k: Tensor, end: int, call: Call) -> list[Tensor]:
        """Candidates before rotation, in blocks; whole blocks are kept, never to be changed."""
        if call.rope is None:
            return [k[:, :, self.sinks : end]]
        kept = call.state[call.layer].get("plain", ())
        parts = list(kept)
        for lo in range(self.sinks + len(kept) * self.chunk, end, self.chunk):
            at = slice(lo, min(lo + self.chunk, end))
            tables = call.tables(k.shape[2], at)
            parts.append(k[:, :, at] if tables is None else ops.unrope(k[:, :, at], *tables))
        call.state[call.layer]["plain"] = tuple(parts[: (end - self.sinks) // self.chunk])
        return parts

    def _numbered(self, k: Tensor, idx: Tensor, call: Call) -> Tensor:
        """The chosen keys, rotated by their rank in the list."""
        if not self.reindex:
            return k[:, :, idx]
        rank = torch.arange(idx.numel(), device=k.device)
        return _turned(k[:, :, idx], k.shape[2], idx, rank, call)

    def _last(self, q: Tensor, k_len: int, read: int, call: Call) -> Tensor:
        """Queries at the last of the positions 0 … read - 1."""
        if not self.reindex:
            return q
        at = torch.arange(read - q.shape[2], read, device=q.device)
        return _turned(q, k_len, slice(-q.shape[2], None), at, call)

    def _layout(self, idx: Tensor, q_len: int, k_len: int, call: Call) -> BlockLayout | None:
        """What a call's queries read, where it is recorded."""
        if call.record is None:
            return None
        counts = torch.full((1, 1, 1), idx.numel(), dtype=torch.int32)
        return BlockLayout(idx.view(1, 1, 1, -1).int(), counts, (self.chunk, 1), (q_len, k_len))


def _turned(x: Tensor, k_len: int, own: slice | Tensor, to: Tensor, call: Call) -> Tensor:
    """Queries or keys that lie at the keys `own`, rotated by other positions (L,)."""
    tables = call.tables(k_len, own)
    if tables is None or call.rope is None:
        return x
    return ops.rope(ops.unrope(x, *tables), *call.rope(to[None]))


def _joined(parts: list[Result], lengths: tuple[int, int]) -> Result:
    """Results of consecutive chunks as one."""
    outs, lses, layouts = zip(*parts, strict=True)
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
    if layouts[0] is None:
        return Result(out, lse)
    width = max(x.indices.shape[3] for x in layouts)
    lists = torch.cat([pad(x.indices, (0, width - x.indices.shape[3])) for x in layouts], 2)
    counts = torch.cat([x.counts for x in layouts], 2)
    return Result(out, lse, BlockLayout(lists, counts, layouts[0].block, lengths))
