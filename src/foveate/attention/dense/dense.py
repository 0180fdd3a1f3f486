"""Dense softmax attention: every visible pair, exactly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.attention.base import Attention, Call, Result, dense_result
from foveate.registry import Card, register


@register(
    Card(
        name="dense",
        title="Dense attention",
        claim="the yardstick: every visible pair is computed",
        kind="attention",
        family="dense",
        patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
        pretrained="exact",
        cost="O(L²·D) time, O(L·D) memory",
        decoding="full KV cache",
        confidence="definition",
    )
)
@dataclass(frozen=True, kw_only=True)
class Dense(Attention):
    """Exact attention over all visible keys."""

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Dense attention."""
        return dense_result(q, k, v, call)
