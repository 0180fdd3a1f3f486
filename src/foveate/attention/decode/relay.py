"""RelayAttention: a prompt that a batch shares is read once for all of it (2024, paper 214)."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.attention._shared import SharedPrefix
from foveate.registry import Card, register


@register(
    Card(
        name="relay",
        title="RelayAttention for Efficient Large Language Model Serving with Long System Prompts",
        claim="attention to a shared system prompt is one matrix product for the whole batch, "
        "fused exactly with each request's own: up to 2.2 times the throughput",
        kind="attention",
        family="decode",
        year=2024,
        paper=214,
        pretrained="exact",
        cost="a decoding step reads the prefix once, not once for every request",
        decoding="one cache of the prefix for all requests, and one of its own for each",
        confidence="high: the paper's identity; layers with a sliding window are refused",
    )
)
@dataclass(frozen=True, kw_only=True)
class Relay(SharedPrefix):
    """Exact attention of a batch of requests to the prefix they share and to their own tokens.

    The prefix comes from `foveate.prefix`, by way of `attach(model, prefix=…)`, or as
    `Call.shared`; documents after it are attended to in parallel. Without one it is dense
    attention.
    """
