"""MoA: Mixture of Sparse Attention, a span of its own for every head (2024, paper 137)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Attention, Call, Pattern, Result
from foveate.ops import Mask
from foveate.registry import Card, register


@register(
    Card(
        name="moa",
        title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        year=2024,
        paper=137,
        claim="spans that differ by head and grow with the input retrieve from afar where one "
        "window for all, of the same density, cannot",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="approximate",
        phases=("prefill", "decode"),
        selection_causal=True,
        cost="O(L·span·D) time, O(L·D) memory; the spans are searched once per model",
        decoding="the same blocks for each new token; give `length`, or the spans grow with it",
        confidence="high: official masks; spans per kv head, of adjacent query heads",
        small={
            "block": 16,
            "sinks": 16,
            "alpha": (0.0, 16.0, 32.0, -16.0),
            "beta": (0.2, 0.1, 0.0, 0.4),
            "length": 157,
        },
        full={"alpha": (0.0,), "beta": (1.0,), "length": None},
    )
)
@dataclass(frozen=True, kw_only=True)
class MoA(Attention):
    """Each kv head sees the sinks and its own span of alpha + beta * N tokens, in whole blocks.

    alpha (tokens, may be negative) and beta (share of N) hold one number for all, one per layer, or
    one per layer and kv head, layer by layer. N is `length`, or the number of keys of the call.
    """

    block: int = 64
    sinks: int = 64
    alpha: tuple[float, ...] = (0.0,)
    beta: tuple[float, ...] = (0.5,)
    length: int | None = None

    def __post_init__(self) -> None:
        ops.check_block("block", self.block)
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if not self.alpha or len(self.alpha) != len(self.beta):
            raise ValueError(
                f"alpha and beta must hold the same number of values, "
                f"got {len(self.alpha)} and {len(self.beta)}"
            )
        if min(self.beta) < 0:
            raise ValueError(f"beta must be at least 0, got {min(self.beta)}")
        if self.length is not None:
            ops.check_block("length", self.length)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Attention under the pattern of the layer."""
        length = k.shape[2] if self.length is None else self.length
        rules = self._rules(call.layer, call.layers, k.shape[1])
        bands = [band(a, b, length, self.block) for a, b in rules]
        group = q.shape[1] // k.shape[1]
        one = len(set(bands)) == 1
        spans = bands[:1] if one else [w for w in bands for _ in range(group)]
        pattern = _Spans(block=self.block, sinks=self.sinks, bands=tuple(spans))
        return pattern.compute(q, k, v, call)

    def _rules(self, layer: int, layers: int, heads: int) -> list[tuple[float, float]]:
        """(alpha, beta) of every kv head of a layer."""
        rules = list(zip(self.alpha, self.beta, strict=True))
        if len(rules) not in (1, layers, layers * heads):
            raise ValueError(
                f"alpha must hold 1, {layers} (layers) or {layers * heads} values (layers and kv "
                f"heads), got {len(rules)}"
            )
        if len(rules) == layers * heads:
            return rules[layer * heads : (layer + 1) * heads]
        return [rules[layer if len(rules) == layers else 0]] * heads


@dataclass(frozen=True, kw_only=True)
class _Spans(Pattern):
    """Sinks and a band of blocks, the same for all heads or one per query head."""

    sinks: int
    bands: tuple[int, ...]

    def mask(self, q_len: int, k_len: int, call: Call) -> Mask:
        """Sinks or band."""
        size = self.bands[0] if len(self.bands) == 1 else torch.tensor(self.bands)
        near = ops.window(size, block=self.block)
        return near | ops.sinks(self.sinks) if self.sinks else near


def band(alpha: float, beta: float, length: int, block: int) -> int:
    """Blocks a query reads up to its own one, at least that one, under a rule at N = length."""
    # A share such as 0.29 of 100 blocks is 28.999… in floating point.
    return max(1, math.floor(math.floor(alpha / block) + beta * -(-length // block) + 1e-9))
