"""LongHeads: every head reads the chunks it needs, at positions it knows (2024, paper 47)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Attention, Call, Result, dense_result
from foveate.ops import BlockLayout
from foveate.ops.tile import attend_tile, default_scale, grouped_values
from foveate.registry import Card, register


@register(
    Card(
        name="longheads",
        title="LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
        year=2024,
        paper=47,
        claim="heads that pick their chunks and number them anew find a pass key at 32 times the "
        "trained length, without training",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="approximate",
        phases=("prefill", "decode"),
        selection_causal=True,
        cost="O(L·(attention + L/chunk)·D) time, O(L·D) memory",
        decoding="full KV cache and, per query head, one vector a chunk and the queries of the "
        "last one; give it to prefill and decode",
        confidence="high: official code; a query's own key is read in prefill, too",
        small={"chunk": 8, "attention": 40},
        full={"attention": 1 << 30, "chunk": 1 << 10},
        exempt={
            "mask honoured": "a hidden key carries no weight, but keeps its part in what stands "
            "for its chunk: it may change which chunks are read"
        },
    )
)
@dataclass(frozen=True, kw_only=True)
class LongHeads(Attention):
    """Up to `attention` tokens dense; beyond, a query reads attention / chunk chunks of its head.

    They are the first, the last full one, its own and those whose representation has the largest
    product with the query before rotation. Chunks are numbered anew in their order, so that no
    rotary position reaches `attention`. A chunk is represented by its keys under the attention of
    its mean output; that takes its queries, which are kept for decoding. Keys and queries without
    rotary tables are taken as they are. Needs values as wide as keys.
    """

    stateful: ClassVar[bool] = True

    chunk: int = 256
    attention: int = 4096

    def __post_init__(self) -> None:
        ops.check_block("chunk", self.chunk)
        ops.check_block("attention", self.attention)
        if self.attention % self.chunk or self.attention < 3 * self.chunk:
            raise ValueError(
                f"attention must be a multiple of chunk {self.chunk}, at least 3 of them, "
                f"got {self.attention}"
            )

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Dense for the first `attention` positions, chunks of their own for the others."""
        if v.shape[3] != q.shape[3]:
            raise ValueError(f"longheads needs values of width {q.shape[3]}, got {v.shape[3]}")
        start, seen = k.shape[2] - q.shape[2], call.state.get(call.layer, {}).get("seen", 0)
        if k.shape[2] <= self.attention and start not in (0, seen):
            return dense_result(q, k, v, call)  # nothing is known of the queries before
        plain_q, plain_k = _unrotated(q, k, call)
        near = _rotated(plain_k, torch.arange(k.shape[2], device=k.device) % self.chunk, call)
        kept = self._represented(plain_q, near, v, call)
        early = min(max(self.attention - start, 0), q.shape[2])
        if early == q.shape[2]:
            return dense_result(q, k, v, call)
        out, lse = self._far(plain_q[:, :, early:], near, v, kept, call)
        if early:
            first = (x[:, :, : self.attention] for x in (k, v))
            done = ops.attend(q[:, :, :early], *first, return_lse=True, **call.options())
            out, lse = torch.cat((done[0], out), 2), torch.cat((done[1], lse), 2)
        return Result(out, lse)

    def _far(
        self, q: Tensor, near: Tensor, v: Tensor, kept: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Queries beyond `attention` over their chunks, one rank after the other.

        A key of the chunk of rank r lies r chunks on: turning the query back by as much leaves
        every key at its position inside its chunk.
        """
        lengths, count = (q.shape[2], near.shape[2]), self.attention // self.chunk
        pos = torch.arange(lengths[1] - lengths[0], lengths[1], device=q.device)
        ranks = self._chosen(q, kept, pos)
        parts: list[tuple[Tensor, Tensor]] = []
        for rank in range(count):
            at = (count - 1 - rank) * self.chunk + pos % self.chunk
            one = torch.ones_like(ranks[..., rank], dtype=torch.int32)
            layout = BlockLayout(ranks[..., rank, None].int(), one, (1, self.chunk), lengths)
            turned = _rotated(q, at, call)
            part = ops.block_sparse(turned, near, v, layout, return_lse=True, **call.options())
            parts = [ops.merge([*parts, part])]
        return parts[0]

    @torch.no_grad()
    def _chosen(self, q: Tensor, kept: Tensor, pos: Tensor) -> Tensor:
        """Chunks (B, Hq, Lq, attention / chunk) of every query, ascending."""
        own, count = pos // self.chunk, self.attention // self.chunk
        scores = q.float() @ kept.transpose(-1, -2)
        at = torch.arange(kept.shape[2], device=q.device)
        scores = scores.masked_fill((at == 0) | (at >= own[:, None] - 1), -math.inf)
        best = scores.topk(count - 3, dim=-1).indices
        fixed = torch.stack((torch.zeros_like(own), own - 1, own), -1)
        return torch.cat((best, fixed.expand(*best.shape[:3], 3)), -1).sort(-1).values

    @torch.no_grad()
    def _represented(self, q: Tensor, near: Tensor, v: Tensor, call: Call) -> Tensor:
        """Representations (B, Hq, n, D) of all full chunks, the new ones from their queries."""
        start, held = near.shape[2] - q.shape[2], call.state.setdefault(call.layer, {})
        if start == 0:
            held.update(kept=q[:, :, :0].float(), tail=q[:, :, :0])
        elif held.get("seen") != start:
            raise RuntimeError(
                f"longheads knows the queries of {held.get('seen', 0)} tokens, but {start} lie "
                "before this call: give it to both prefill and decode"
            )
        kept, queries = held["kept"], torch.cat((held["tail"], q), 2)
        first, full = kept.shape[2], near.shape[2] // self.chunk
        new = slice(first * self.chunk, full * self.chunk)
        here = queries[:, :, : new.stop - new.start]
        if full > first:
            made = self._represent(here, near[:, :, new], v[:, :, new], call)
            kept = torch.cat((kept, made), 2)
        # A copy: a view would hold on to the queries of the whole prompt.
        tail = queries[:, :, new.stop - new.start :].clone()
        held.update(kept=kept, tail=tail, seen=near.shape[2])
        return kept

    def _represent(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Of whole chunks: their keys under the attention of their mean output."""
        kv, group = k.shape[1], q.shape[1] // k.shape[1]
        scale = default_scale(call.scale, q.shape[3])
        at = torch.arange(q.shape[2], device=q.device) % self.chunk
        # (B, H, n * w, D) -> (B * Hkv * n, H / Hkv, w, D)
        q, k, v = (
            x.unflatten(2, (-1, self.chunk)).unflatten(1, (kv, -1)).transpose(2, 3).flatten(0, 2)
            for x in (_rotated(q, at, call).float(), k.float(), v.float())
        )
        mean = attend_tile(q, k, v, None, scale, call.softcap)[0].mean(2, keepdim=True)
        weights = torch.softmax(ops.grouped_logits(mean, k, scale), -1)
        made = grouped_values(weights, k).view(-1, kv, at.numel() // self.chunk, group, k.shape[3])
        return made.transpose(2, 3).flatten(1, 2)


def _unrotated(q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Queries and keys as they were before rotation."""
    tables = call.tables(k.shape[2])
    if tables is None:
        return q, k
    cos, sin = (x.to(k.device) for x in tables)
    last = slice(k.shape[2] - q.shape[2], None)
    return ops.unrope(q, cos[:, last], sin[:, last]), ops.unrope(k, cos, sin)


def _rotated(x: Tensor, at: Tensor, call: Call) -> Tensor:
    """x (B, H, L, D) rotated by positions (L,), unless nothing was rotated."""
    return x if call.rope is None else ops.rope(x, *call.rope(at[None]))
