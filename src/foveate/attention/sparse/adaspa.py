"""AdaSpa: training-free and adaptive sparse attention for long video (2025, paper 65)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import BlockSparse, Call, Result
from foveate.ops import BlockLayout
from foveate.registry import Card, register


@register(
    Card(
        name="adaspa",
        title="Training-free and Adaptive Sparse Attention for Efficient Long Video Generation",
        year=2025,
        paper=65,
        claim="which blocks matter hardly changes from one denoising step to the next: two exact "
        "searches serve fifty steps",
        kind="attention",
        family="sparse",
        patterns=("noncausal self",),
        pretrained="approximate",
        phases=("prefill",),
        cost="(1 - sparsity)·L²·D a step, twice L²·D for a search; O(L·D + (L/block)²) memory",
        decoding="none: a video is attended to as a whole",
        confidence="medium: the paper, no official code; the share of heads that trade blocks is "
        "capped at half, and a later search is followed by sparse attention",
        small={"block": 16, "text": 4, "dense_steps": 0, "searches": (0, 1)},
        full={"sparsity": 0.0},
    )
)
@dataclass(frozen=True, kw_only=True)
class AdaSpa(BlockSparse):
    """The blocks that held most attention at the last search, for the denoising steps after it.

    The first search, at the first step that is not dense, attends to everything and keeps lse;
    those at later steps of `searches` weigh blocks by that lse. Of all blocks of a row a head
    keeps the share 1 - `sparsity`; of the heads that keep more than `recall` of the mass so, half
    of all at most, the best keep half of that share, and as many of the worst heads half as much
    again (if sparsity is at least 1/3). The last `text` tokens see all and are seen by all. The
    search lives in the call's memory: each guidance branch needs its own, and without one every
    call is a first search.
    """

    stateful: ClassVar[bool] = True

    block: int = 64
    dense_steps: int = 10
    sparsity: float = 0.8
    searches: tuple[int, ...] = (10, 30)
    recall: float = 0.8
    text: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if not 0 <= self.recall <= 1:
            raise ValueError(f"recall must be in [0, 1], got {self.recall}")
        if self.text < 0:
            raise ValueError(f"text must be at least 0, got {self.text}")
        if any(step < 0 for step in self.searches):
            raise ValueError(f"searches must be steps from 0, got {self.searches}")

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Dense attention and the first search, or attention over what the last one found."""
        slot = call.state[call.layer]
        if "layout" in slot and slot["layout"].lengths == (q.shape[2], k.shape[2]):
            return super().compute(q, k, v, call)
        out, lse = ops.attend(q, k, v, return_lse=True, **call.options())
        slot["lse"] = lse.detach()
        slot["layout"] = self.search(q, k, slot["lse"], call)
        return Result(out, lse)

    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout:
        """The blocks of the last search, which may be due now."""
        slot = call.state[call.layer]
        if call.step in self.searches:
            slot["layout"] = self.search(q, k, slot["lse"], call)
        return cast(BlockLayout, slot["layout"])

    @torch.no_grad()
    def search(self, q: Tensor, k: Tensor, lse: Tensor, call: Call) -> BlockLayout:
        """The blocks that hold most mass by an lse (B, Hq, Lq), which may be an earlier step's."""
        mass = ops.block_mass(q, k, lse, self.block, **call.options())
        # By an old lse rows do not sum to the number of their queries.
        mass = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        lengths, usual = (q.shape[2], k.shape[2]), mass.new_ones(1, 1, 1)
        words = self._words(lengths).to(q.device)
        chosen = self._heaviest(mass, usual) | words
        if self.sparsity >= 1 / 3:
            found = mass.masked_fill(~chosen, 0).sum(-1).mean(-1).clamp_max(1)
            chosen = self._heaviest(mass, self._budgets(found)[..., None]) | words
        return ops.from_map(chosen, self.block, lengths)

    def _budgets(self, found: Tensor) -> Tensor:
        """Budgets of heads that found some mass (B, Hq), as multiples of the usual one."""
        heads = found.shape[-1]
        moved = (found > self.recall).sum(-1, keepdim=True).clamp_max(heads // 2)
        rank = found.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return 1 - 0.5 * (rank < moved).to(found.dtype) + 0.5 * (rank >= heads - moved)

    def _heaviest(self, mass: Tensor, budget: Tensor) -> Tensor:
        """The heaviest blocks of every row, at a budget (1|B, 1|Hq, 1) in usual ones."""
        wanted = (1 - self.sparsity) * mass.shape[-1] * budget.double()
        return ops.top_k(mass, (wanted - 1e-6).ceil().clamp_min(1))  # (1 - 0.7) * 10 > 3

    def _words(self, lengths: tuple[int, int]) -> Tensor:
        """Blocks (nQ, nK) that hold a token of the text, as query or as key."""
        grid, b = ops.TileGrid.of(*lengths, self.block), self.block
        first = max(lengths[1] - self.text, 0) // b if self.text else lengths[1]
        rows = torch.arange(grid.first, grid.first + grid.tiles) >= first
        return rows[:, None] | (torch.arange(-(-lengths[1] // b)) >= first)
