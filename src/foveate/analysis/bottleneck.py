"""The New LLM Bottleneck: work and traffic of a decoding step (2025, paper 220)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from foveate import ops
from foveate.attention.base import Attention, Call, Memory, Record
from foveate.cache.base import CachePolicy, Eviction
from foveate.registry import Card, register

# Layers of a step that is watched, and steps: enough for mechanisms that choose now and then.
_LAYERS, _STEPS = 8, 8


class Cost(NamedTuple):
    """Floating-point operations, and bytes of cache read, of one layer and row."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte: below that of a machine its memory is the bottleneck, not it."""
        return self.flops / self.bytes


def latent(
    heads: int, rank: int, rope: int, tokens: int, *, queries: int = 1, itemsize: int = 2
) -> Cost:
    """Multi-head latent attention, absorbed: every head reads the same rank + rope numbers.

    Logits take rank + rope products for each head and token, outputs rank.
    """
    flops = 2.0 * queries * heads * tokens * (rank + rope + rank)
    return Cost(flops, float(tokens * (rank + rope) * itemsize))


def expert(dim: int, hidden: int, tokens: float, *, itemsize: int = 2) -> Cost:
    """An expert of three dim × hidden matrices that serves this many tokens at once."""
    weights = 3.0 * dim * hidden
    return Cost(2.0 * weights * tokens, weights * itemsize)


@register(
    Card(
        name="bottleneck",
        title="The New LLM Bottleneck: A Systems Perspective on Latent Attention and "
        "Mixture-of-Experts",
        year=2025,
        paper=220,
        claim="latent attention decodes at the arithmetic intensity of matrix products",
        kind="analysis",
        family="decode",
        pretrained="exact",
        cost="arithmetic; for a mechanism some steps on random tokens",
        confidence="high on the formulas; the paper's models of hardware are not reproduced",
    )
)
@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """What the attention of a decoding step costs after `tokens` others, in one layer and row.

    `kv_heads` equal to `heads` is multi-head, 1 multi-query attention. `queries` tokens are decoded
    at once (speculation makes several), numbers of `itemsize` bytes.
    """

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    tokens: int = 8192
    queries: int = 1
    itemsize: int = 2

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "dim", "tokens", "queries", "itemsize"):
            ops.check_block(name, getattr(self, name))
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )

    def __call__(self, mechanism: Any = None) -> Cost:
        """Of dense attention to a full cache, or of an attention mechanism or a cache policy.

        Keys and values that a mechanism reads are counted on random tokens, one query at a time,
        those that several heads of a group read once; finding them is not counted. A policy is
        taken at its claim. Raises TypeError for anything else, ValueError for attention that is
        not causal.
        """
        full = self._cost(1.0, 1.0)
        if mechanism is None:
            return full
        if isinstance(mechanism, CachePolicy):
            sizes = {"kv_heads": self.kv_heads, "dim": self.dim, "itemsize": self.itemsize}
            held = mechanism.claimed_bytes(self.tokens, self.tokens, **sizes)
            return Cost(full.flops * self._slots(mechanism) / self.tokens, held)
        if isinstance(mechanism, Attention):
            return self._cost(*self._read(mechanism))
        raise TypeError(
            f"a cost is that of an attention mechanism or a cache policy, got {mechanism!r}"
        )

    def _cost(self, pairs: float, rows: float) -> Cost:
        """Of these shares of all pairs of queries and keys, and of all keys; values alike."""
        width = self.tokens * self.dim
        flops, size = 4.0 * self.queries * self.heads, 2.0 * self.itemsize * self.kv_heads
        return Cost(flops * width * pairs, size * width * rows)

    def _slots(self, policy: CachePolicy) -> float:
        """Slots of a kv head that hold the tokens."""
        if not isinstance(policy, Eviction) or not policy.due(self.tokens, prefill=True):
            return self.tokens
        return policy.slots(policy.budget, 0)

    @torch.no_grad()
    def _read(self, mechanism: Attention) -> tuple[float, float]:
        """Shares of the pairs computed and of the keys read, over layers and decoded tokens."""
        made, memory = torch.Generator().manual_seed(0), Memory()
        sizes = ((self.heads, 1 + _STEPS), *((self.kv_heads, self.tokens + _STEPS),) * 2)
        q, k, v = (torch.randn(1, h, n, self.dim, generator=made) for h, n in sizes)
        shares = []
        for step in range(1 + _STEPS):
            query = q[:, :, step : step + 1]
            keys, values = (x[:, :, : self.tokens + step] for x in (k, v))
            for layer in range(_LAYERS):
                told: list[Record] = []
                call = Call(layer=layer, layers=_LAYERS, memory=memory, phase="decode")
                if step == 0:
                    mechanism.after_prefill(query, keys, call)
                    continue
                call.record = told.append
                mechanism(query, keys, values, call=call)
                shares.append(self._shares(told))
        pairs, rows = torch.tensor(shares).mean(0).tolist()
        return pairs, rows

    def _shares(self, told: list[Record]) -> tuple[float, float]:
        """Of the pairs and of the keys of one call, which tells nothing where it was dense."""
        if not told:
            return 1.0, 1.0
        layout = told[0].layout
        read, (_, tokens), width = layout.to_bool()[0, :, 0], layout.lengths, layout.block[1]
        sizes = torch.full((read.shape[1],), width)
        sizes[-1] = tokens - width * (len(sizes) - 1)
        by_head = read.repeat_interleave(self.heads // len(read), 0)
        by_group = by_head.unflatten(0, (self.kv_heads, -1)).any(1)
        pairs, rows = (float((x * sizes).sum()) / (len(x) * tokens) for x in (by_head, by_group))
        return pairs, rows
