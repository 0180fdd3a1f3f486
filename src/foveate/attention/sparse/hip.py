"""HiP: sub-quadratic attention by hierarchical pruning (2024, paper 15)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import BlockSparse, Call, Pattern, Result, dense_result, token_layout
from foveate.ops import BlockLayout, Mask
from foveate.registry import Card, register


@register(
    Card(
        name="hip",
        title="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
        year=2024,
        paper=15,
        claim="a tree search finds the top key blocks of each query block in O(log L) rounds",
        kind="attention",
        family="sparse",
        patterns=("causal self", "noncausal self", "noncausal cross"),
        pretrained="approximate",
        phases=("prefill", "decode"),
        selection_causal=False,
        cost="O(L·budget·log(L/budget)·D) to choose, O(L·(budget + window)·D) to attend",
        decoding="the same search for each new token over the full cache",
        confidence="high on the algorithm, medium on which layers the experiments kept dense",
        small={"block": 16, "budget": 32, "window": 16, "sinks": 4, "dense_layers": ()},
        full={"budget": 1 << 30},
        exempt={"decode = prefill": "one search serves a block of queries; equal for block=1"},
    )
)
@dataclass(frozen=True, kw_only=True)
class HiP(BlockSparse):
    """Sinks, a window, and per query block the `budget` tokens a binary tree search finds.

    Keys between sinks and window are cut into slots; every round halves each slot, scores a half
    by its `representative` block of `key_block` keys (largest q·k over every `stride`-th query of
    the block, counted from its last), and keeps the best, until slots are single key blocks.
    Without causality there is no window. Attention is dense up to budget + window + sinks keys.
    """

    block: int = 64
    dense_layers: tuple[int, ...] = (0, 1, 2)
    budget: int = 512
    key_block: int = 2
    window: int = 256
    sinks: int = 16
    stride: int = 2
    representative: Literal["center", "first", "last"] = "center"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("budget", "key_block", "window", "sinks", "stride"):
            ops.check_block(name, getattr(self, name))
        for name, n in (("budget", self.budget), ("sinks", self.sinks)):
            if n % self.key_block:
                raise ValueError(
                    f"{name} must be a multiple of key_block {self.key_block}, got {n}"
                )
        kind = self.representative
        if kind not in ("center", "first", "last"):
            raise ValueError(f"representative must be center, first or last, got {kind!r}")

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Sinks and window, and the chosen blocks outside of them, merged into one softmax."""
        layout = self.select(q, k, call)
        if layout is None:
            return dense_result(q, k, v, call)
        near = _Near(window=self.window if call.causal else 0, sinks=self.sinks)
        rule = near.mask(*layout.lengths, call)
        far, searched = ~rule, layout
        if call.mask is not None:
            far, searched = call.mask & far, dataclasses.replace(layout, partial=None)
        options = call.options() | {"mask": far}
        chosen = ops.block_sparse(q, k, v, searched, return_lse=True, **options)
        close = near.compute(q, k, v, call)
        out, lse = ops.merge([chosen, (close.out, cast(Tensor, close.lse))])
        if call.record is not None:
            seen = rule & ops.causal() if call.causal else rule
            around = seen.to_layout(*layout.lengths, layout.block).to_bool().to(q.device)
            layout = ops.from_map(layout.to_bool() | around, layout.block, layout.lengths)
        return Result(out, lse, layout)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout | None:
        """The key blocks found for every query block, those of sinks and window apart."""
        lengths = (q.shape[2], k.shape[2])
        if lengths[1] <= self.budget + self.window + self.sinks:
            return None
        start, grid = max(lengths[1] - lengths[0], 0), ops.TileGrid.of(*lengths, self.block)
        first = (torch.arange(grid.tiles, device=q.device) + grid.first) * self.block
        last = (first + self.block).clamp_max(max(lengths)) - 1
        rows = last[:, None] - torch.arange(0, self.block, self.stride, device=q.device)
        # A row outside of the queries gives way to the last one: a repeat changes no maximum.
        rows = torch.where(rows >= first.clamp_min(start)[:, None], rows, last[:, None])
        asked = q[:, :, (rows - start).flatten()].reshape(-1, *rows.shape[1:], q.shape[3])
        end = last + 1 - self.window if call.causal else torch.full_like(last, lengths[1])
        lanes = torch.arange(q.shape[0] * q.shape[1], device=q.device)
        found, real = ops.tree_search(
            asked,
            k.flatten(0, 1),
            (lanes // (q.shape[1] // k.shape[1])).repeat_interleave(grid.tiles),
            end.repeat(len(lanes)),
            slots=self.budget // self.key_block,
            start=self.sinks,
            width=self.key_block,
            # Only below a window shorter than the query block do rows precede searched keys.
            pos=rows.repeat(len(lanes), 1) if call.causal and self.window < self.block else None,
            representative=self.representative,
        )
        found, real = (x.view(*q.shape[:2], grid.tiles, -1) for x in (found, real))
        blocks = found + self.sinks // self.key_block
        by_tile = token_layout(blocks, real, lengths[1], self.key_block)
        # Only where the window of an early row reaches back is a block not wholly outside of it.
        edge = first[:, None] - self.window if call.causal else lengths[1]
        partial = (by_tile.indices + 1) * self.key_block > edge
        size = (self.block, self.key_block)
        return dataclasses.replace(by_tile, block=size, lengths=lengths, partial=partial)


@dataclass(frozen=True, kw_only=True)
class _Near(Pattern):
    """What every query reads: sinks and, unless it is 0, a window."""

    window: int
    sinks: int

    def mask(self, q_len: int, k_len: int, call: Call) -> Mask:
        """Sinks or window."""
        sinks = ops.sinks(self.sinks)
        return sinks | ops.window(self.window) if self.window else sinks
