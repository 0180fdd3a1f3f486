"""MoBA: Mixture of Block Attention for Long-Context LLMs (2025, paper 189)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import BlockSparse, Call, token_layout
from foveate.ops import BlockLayout
from foveate.registry import Card, register


@register(
    Card(
        name="moba",
        title="MoBA: Mixture of Block Attention for Long-Context LLMs",
        year=2025,
        paper=189,
        claim="routing every token to its own block and a few others trains as well as dense "
        "attention, at up to 81% sparsity for 8k tokens",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="approximate",
        phases=("prefill", "decode"),
        selection_causal=True,
        cost="O(L·top_k·block·D + L²/block·D) time, O(L·(D + top_k)) memory",
        decoding="the same gate for each new token over the full cache",
        confidence="high: the definition of the official code",
        small={"block": 16, "top_k": 3},
        full={"top_k": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class MoBA(BlockSparse):
    """Every query token reads its own block and those whose mean key it agrees with most.

    `top_k` counts the own block. Blocks are cut on absolute positions, and only blocks that ended
    before the query's own one compete, so that a choice never depends on later tokens. Attention
    is dense up to top_k blocks of keys.
    """

    block: int = 512
    top_k: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_block("top_k", self.top_k)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout | None:
        """One list of blocks per query token."""
        if k.shape[2] <= self.top_k * self.block:
            return None
        whole = k.shape[2] // self.block
        means = ops.pool_blocks(k[:, :, : whole * self.block], self.block)
        grid = ops.TileGrid.of(q.shape[2], k.shape[2], self.block)
        cuts = [max(t * self.block - grid.lead, 0) for t in range(grid.tiles)]
        tiles = q.tensor_split(cuts[1:], dim=2)
        lists = torch.cat([self._route(x, means, grid.first + t) for t, x in enumerate(tiles)], 2)
        return token_layout(lists.clamp_min(0), lists >= 0, k.shape[2], self.block)

    def _route(self, q: Tensor, means: Tensor, own: int) -> Tensor:
        """Blocks (B, Hq, R, top_k) of the queries of block `own`; -1 where there are too few."""
        others = min(self.top_k - 1, own)
        lists = torch.full((*q.shape[:3], self.top_k), -1, device=q.device)
        lists[..., 0] = own
        if others:
            gate = ops.grouped_logits(q, means[:, :, :own], 1.0)
            lists[..., 1 : others + 1] = gate.topk(others, dim=-1, sorted=False).indices
        return lists
