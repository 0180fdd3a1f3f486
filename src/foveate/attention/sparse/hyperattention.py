"""HyperAttention: buckets of similar queries and keys, the rest sampled (2023, paper 43)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate import ops
from foveate.attention.base import Attention, Call, Result
from foveate.ops.tile import attend_tile, default_scale
from foveate.registry import Card, register

Part = tuple[Tensor, Tensor]


@register(
    Card(
        name="hyperattention",
        title="HyperAttention: Long-context Attention in Near-Linear Time",
        year=2023,
        paper=43,
        claim="heavy entries found by sorting hashes, the rest by sampling: near-linear time",
        kind="attention",
        family="sparse",
        patterns=("causal self", "noncausal self", "noncausal cross"),
        pretrained="approximate",
        phases=("prefill",),
        selection_causal=False,
        cost="O(L·(block + samples)·D) time, log L times that if causal; O(L·(D + samples)) memory",
        decoding="dense: a single query has no bucket",
        confidence="high: official code; buckets are ordered by the inverse Gray code, as the "
        "paper means it, and no key counts twice",
        small={"projections": 4, "block": 16, "samples": 16, "min_seq_len": 32},
        full={"min_seq_len": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class HyperAttention(Attention):
    """Queries and keys are sorted by an angular hash; a block of one attends to its block of other.

    The hash has one bit per projection, and neighbouring buckets differ in one bit. What lies
    outside of a query's block is estimated from `samples` keys drawn with replacement. Causal
    attention halves the sequence again and again: halves below `min_seq_len` are exact, late
    queries see early keys through the estimate. Projections and samples follow from `seed` and
    are shared by all heads.
    """

    projections: int = 7
    block: int = 256
    samples: int = 256
    min_seq_len: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("projections", "block", "samples", "min_seq_len"):
            ops.check_block(name, getattr(self, name))
        if self.projections > 16:
            raise ValueError(f"projections must be at most 16, got {self.projections}")

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """All queries, by halves when causal."""
        draw = torch.Generator().manual_seed(self.seed)
        planes = torch.randn(q.shape[3], self.projections, generator=draw).to(q.device)
        run = _Run(self, planes, draw, call)
        past = k.shape[2] - q.shape[2]
        if not call.causal:
            return Result(*run.estimate(q, k, v, max(past, 0), 0))
        own = run.causal(q, k[:, :, past:], v[:, :, past:], past)
        if past == 0:
            return Result(*own)
        return Result(*ops.merge([run.estimate(q, k[:, :, :past], v[:, :, :past], past, 0), own]))

    def ranks(self, x: Tensor, planes: Tensor) -> Tensor:
        """Place of every vector's bucket (B, H, L) in an order where neighbours differ in a bit."""
        bits = (x.float() @ planes > 0).long()
        code = (bits << torch.arange(self.projections, device=x.device)).sum(-1)
        # The inverse of the Gray code i ^ (i >> 1): every bit is the parity of those above it.
        for shift in (1, 2, 4, 8):
            code = code ^ (code >> shift)
        return code


@dataclass
class _Run:
    """One call: positions matter to the call's mask only."""

    rule: HyperAttention
    planes: Tensor
    draw: torch.Generator
    call: Call

    def causal(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Part:
        """Causal attention of equal lengths, the first position being `start`."""
        length = q.shape[2]
        if length <= self.rule.min_seq_len:
            return self._exact(q, k, v, start, start, causal=True)
        half = length // 2
        early = self.causal(q[:, :, :half], k[:, :, :half], v[:, :, :half], start)
        late = self.causal(q[:, :, half:], k[:, :, half:], v[:, :, half:], start + half)
        across = self.estimate(q[:, :, half:], k[:, :, :half], v[:, :, :half], start + half, start)
        late = ops.merge([across, late])
        return torch.cat((early[0], late[0]), 2), torch.cat((early[1], late[1]), 2)

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int) -> Part:
        """Attention to both sides: own block exactly, the rest sampled."""
        rule, (lq, lk) = self.rule, (q.shape[2], k.shape[2])
        if lq < rule.min_seq_len or lk <= rule.block:
            return self._exact(q, k, v, q_start, k_start, causal=False)
        order_q, order_k = (rule.ranks(x, self.planes).argsort(dim=-1, stable=True) for x in (q, k))
        q, k, v = _take(q, order_q), _take(k, order_k), _take(v, order_k)
        q_pos, k_pos = order_q + q_start, order_k + k_start
        rows = -(-lq * rule.block // lk)
        near = self._blocks(q, k, v, q_pos, k_pos, rows)
        far = self._sampled(q, k, v, q_pos, k_pos, rows)
        out, lse = ops.merge([near, far])
        back = order_q.argsort(-1)
        return _take(out, back), lse.gather(2, back)

    def _exact(
        self, q: Tensor, k: Tensor, v: Tensor, q_start: int, k_start: int, *, causal: bool
    ) -> Part:
        options = self.call.options() | {"causal": causal}
        if self.call.mask is not None:
            options["q_pos"] = torch.arange(q.shape[2], device=q.device) + q_start
            options["k_pos"] = torch.arange(k.shape[2], device=q.device) + k_start
        return ops.attend(q, k, v, return_lse=True, **options)

    def _blocks(
        self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, rows: int
    ) -> Part:
        """Sorted queries attend to the keys of the same place in their order."""
        (b, heads, lq, _), (_, kv, lk, _), size = q.shape, k.shape, self.rule.block
        group, n = heads // kv, -(-lq // rows)
        fill_q, fill_k = n * rows - lq, n * size - lk

        def tiles(x: Tensor, fill: int, each: int, lanes: int) -> Tensor:
            """(B, H, L, D) -> (B * Hkv * n, H / Hkv, each, D); ragged ends are filled or cut."""
            x = pad(x, (0, 0, 0, fill)).unflatten(2, (n, each)).unflatten(1, (kv, lanes))
            return x.transpose(2, 3).flatten(0, 2)

        tiled_q, tiled_k = tiles(q, fill_q, rows, group), tiles(k, fill_k, size, 1)
        tiled_v = tiles(v, fill_k, size, 1)
        bias = self._bias(
            pad(q_pos, (0, fill_q)).unflatten(2, (n, rows))[..., None],
            pad(k_pos, (0, fill_k))
            .unflatten(2, (n, size))
            .repeat_interleave(group, 1)[..., None, :],
            (torch.arange(n * size, device=q.device) < lk).view(n, 1, size),
            q,
        )
        bias = bias.expand(b, heads, n, rows, size).unflatten(1, (kv, group)).transpose(2, 3)
        scale = default_scale(self.call.scale, q.shape[3])
        bias = bias.flatten(0, 2)
        out, lse = attend_tile(tiled_q, tiled_k, tiled_v, bias, scale, self.call.softcap)
        out, lse = (
            x.unflatten(0, (b, kv, n)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :lq]
            for x in (out, lse)
        )
        return out, lse

    def _sampled(
        self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, rows: int
    ) -> Part:
        """What lies outside of a query's block, from keys that stand for Lk / samples each."""
        lk, count, group = k.shape[2], self.rule.samples, q.shape[1] // k.shape[1]
        at = torch.randint(lk, (count,), generator=self.draw).to(q.device)
        own = torch.arange(q.shape[2], device=q.device)[:, None] // rows == at // self.rule.block
        seen_at = k_pos[:, :, at].repeat_interleave(group, 1)[:, :, None]
        bias = self._bias(q_pos[..., None], seen_at, ~own, q)
        scale = default_scale(self.call.scale, q.shape[3])
        bias = bias.expand(*q.shape[:3], count)
        out, lse = attend_tile(q, k[:, :, at], v[:, :, at], bias, scale, self.call.softcap)
        return out, lse + math.log(lk / count)

    def _bias(self, q_pos: Tensor, k_pos: Tensor, real: Tensor, like: Tensor) -> Tensor:
        """0 where a key counts, -inf elsewhere; positions (B, Hq, …) broadcast."""
        if self.call.mask is not None:
            shape = (-1, *(1,) * (q_pos.dim() - 1))
            b = torch.arange(q_pos.shape[0], device=like.device).view(shape)
            h = torch.arange(q_pos.shape[1], device=like.device).view(shape[:-1])
            real = real & self.call.mask(b, h, q_pos, k_pos)
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.zeros(real.shape, dtype=wide, device=like.device).masked_fill(~real, -math.inf)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, L, D) with its rows in another order (B, H, L)."""
    return x.gather(2, order[..., None].expand(*order.shape, x.shape[3]))
