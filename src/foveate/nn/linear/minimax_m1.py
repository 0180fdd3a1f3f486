"""MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (2025, paper 305)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate.nn._attention import heads_of
from foveate.nn._linear import JointReadout
from foveate.nn.linear.lightning2 import Lightning2
from foveate.ops.checks import check_shape
from foveate.registry import Card, register


@register(
    Card(
        name="minimax_m1",
        title="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
        year=2025,
        paper=305,
        claim="seven lightning layers to one of softmax make long thinking cheap, and clipped "
        "weights that keep their gradient let every token learn from its reward",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·(C + D)·D) time in blocks of C tokens",
        decoding="a state of heads · D² numbers",
        confidence="high for the layer, medium for constants of the objective",
        small={"dim": 32, "heads": 4, "index": 1, "layers": 3},
    )
)
class MiniMaxM1(Lightning2):
    """Lightning attention of SiLU(q), SiLU(k) and SiLU(v), one norm over all heads, a sigmoid gate.

    The slopes are those of the "minimax" preset: layer 0 of `layers` forgets fastest. In a model
    one layer of softmax attention follows seven of these: "minimax_m1*7, softmax_attention" as the
    pattern of a `Transformer`. Raises ValueError for sizes that do not divide and an index that is
    not below `layers`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        index: int = 0,
        layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, decay="minimax", index=index, layers=layers, **made)

    def way_out(self, heads: int, made: dict[str, Any]) -> nn.Module:
        """Norm over all heads, gate and projection."""
        return JointReadout(self.dim, self.dim, gate="sigmoid", eps=1e-6, **made)

    def split(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All three after SiLU."""
        q, k, v = heads_of(silu(self.qkv(x)), 3 * self.width).chunk(3, -1)
        return q, k, v


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """Rewards (…, G) of G answers to one question, less their mean, by their deviation + eps."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, correction=0, keepdim=True) + eps)


def cispo_loss(
    log_p: Tensor,
    old_log_p: Tensor,
    advantages: Tensor,
    *,
    upper: float,
    lower: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """-Σ w · advantage · log p over tokens, divided by their number: clipped weights, not ratios.

    log_p and old_log_p (G, L) are those of the tokens of G answers under the policy and under the
    one that wrote them, advantages (G,), valid (G, L) bool says which tokens there are. w is
    p / p_old within [1 - lower, 1 + upper], taken as a constant: a clipped token keeps a gradient,
    and lower 1 does not clip. Raises ValueError for shapes and bounds that do not fit.
    """
    check_shape("old_log_p", old_log_p, tuple(log_p.shape))
    check_shape("advantages", advantages, tuple(log_p.shape[:1]))
    if upper < 0 or not 0 <= lower <= 1:
        raise ValueError(f"upper must be >= 0 and lower in [0, 1], got {upper} and {lower}")
    weight = (log_p - old_log_p).exp().clamp(1 - lower, 1 + upper).detach()
    gain = weight * advantages[:, None] * log_p
    if valid is None:
        return -gain.mean()
    check_shape("valid", valid, tuple(log_p.shape))
    return -gain.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)
