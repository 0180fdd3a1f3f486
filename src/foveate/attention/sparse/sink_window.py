"""Attention sinks plus a sliding window: the common training-free baseline."""

from __future__ import annotations

from dataclasses import dataclass

from foveate import ops
from foveate.attention.base import Call, Pattern
from foveate.ops import Mask
from foveate.registry import Card, register


@register(
    Card(
        name="sink_window",
        title="Sinks and a sliding window (common baseline)",
        claim="the first tokens and the recent ones keep a model fluent at any length",
        kind="attention",
        family="sparse",
        patterns=("causal self", "noncausal self"),
        cost="O(L·(sinks + window)·D) time, O(L·D) memory",
        decoding="same pattern over the full cache; pair with the cache policy `window` to drop it",
        confidence="definition",
        small={"sinks": 2, "window": 16, "block": 16},
        full={"window": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class SinkWindow(Pattern):
    """Every query sees the first `sinks` tokens and the `window` tokens up to itself."""

    sinks: int = 16
    window: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_block("window", self.window)
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")

    def mask(self, q_len: int, k_len: int, call: Call) -> Mask:
        """Sinks or window."""
        band = ops.window(self.window)
        return band | ops.sinks(self.sinks) if self.sinks else band
