"""MaTVLM: Hybrid Mamba-Transformer for Efficient Vision-Language Modeling (2025, paper 309)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from foveate import ops
from foveate.nn._attention import Projections
from foveate.nn._linear import head_width
from foveate.nn.linear.mamba2 import StateSpaceDual
from foveate.registry import Card, register


@register(
    Card(
        name="matvlm",
        title="MaTVLM: Hybrid Mamba-Transformer for Efficient Vision-Language Modeling",
        year=2025,
        paper=309,
        claim="an attention layer's own projections are a good start for the Mamba-2 layer that "
        "takes its place",
        kind="module",
        family="linear",
        pretrained="approximate",
        cost="O(L·heads·D²) time",
        decoding="a state of heads · D · D numbers and the last inputs of a convolution",
        confidence="high (official code)",
        small={"dim": 32, "heads": 4, "kv_heads": 2},
    )
)
class MaTVLM(StateSpaceDual):
    """Mamba-2 of an attention layer's sizes: C is its query, B its key and x its value.

    B and x have `kv_heads`, each shared by consecutive heads; `head_dim` None is dim / heads.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        conv: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = head_width(dim, heads) if head_dim is None else head_dim
        kv_heads = heads if kv_heads is None else kv_heads
        counts = (kv_heads, kv_heads, heads)
        made: dict[str, Any] = {"groups": heads, "conv": conv, "device": device, "dtype": dtype}
        super().__init__(dim, heads, ops.check_block("head_dim", width), width, counts, **made)

    @classmethod
    @torch.no_grad()
    def from_attention(cls, weights: Projections, heads: int, *, conv: int = 4) -> MaTVLM:
        """A layer that starts from a trained one; positions are lost, the rest starts as new.

        Raises ValueError for projections that are of no `heads` heads.
        """
        channels, dim = weights.q.shape
        width = head_width(channels, heads)
        kept = weights.k.shape[0]
        if kept % width or weights.v.shape[0] != kept:
            raise ValueError(
                f"keys and values must be heads of {width} channels as the queries, "
                f"got {kept} and {weights.v.shape[0]} channels"
            )
        made: dict[str, Any] = {"device": weights.q.device, "dtype": weights.q.dtype}
        layer = cls(dim, heads, kept // width, head_dim=width, conv=conv, **made)
        rows = torch.cat((weights.v, weights.k, weights.q))
        layer.inner.weight[channels : channels + len(rows)] = rows
        layer.out.weight.copy_(weights.out)
        return layer


def distillation_loss(
    layers: Sequence[tuple[Tensor, Tensor]],
    logits: Tensor,
    wanted: Tensor,
) -> Tensor:
    """What a converted model is trained on: the distance to its teacher, in layers and at the end.

    layers are what converted layers give for the teacher's input to them, and what the teacher's
    own give, (B, L, dim) each: their distances |a - b| over all numbers are added up. logits and
    the teacher's, `wanted`, are (B, L, vocabulary): added is the KL divergence of the first from
    the second, in nats, mean over tokens. Raises ValueError for shapes that differ.
    """
    for a, b in (*layers, (logits, wanted)):
        if a.shape != b.shape:
            raise ValueError(f"student and teacher differ: {tuple(a.shape)} and {tuple(b.shape)}")
    own, teacher = (log_softmax(x.flatten(0, -2).float(), -1) for x in (logits, wanted))
    away = kl_div(own, teacher, log_target=True, reduction="batchmean")
    return away + sum((a - b).float().norm() for a, b in layers)
