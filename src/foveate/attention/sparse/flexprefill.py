"""FlexPrefill: a pattern and a budget chosen per head and prompt (2025, paper 0)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate import ops
from foveate.attention.base import BlockSparse, Call
from foveate.ops import BlockLayout
from foveate.ops.tile import cap, default_scale
from foveate.registry import Card, register


@register(
    Card(
        name="flexprefill",
        title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient "
        "Long-Sequence Inference",
        year=2025,
        paper=0,
        claim="patterns and budgets chosen per head and prompt match dense, several times faster",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="approximate",
        phases=("prefill",),
        selection_causal=False,
        cost="O(block·L·D + (L/block)²·D) to choose, density·L²·D to attend; O(block·L) memory",
        decoding="dense over the full cache",
        confidence="high: official code; its fixed divisor 128 and NaN on underflow set right",
        small={"block": 16, "gamma": 0.6, "min_budget": 16},
        full={"gamma": 1.0},
    )
)
@dataclass(frozen=True, kw_only=True)
class FlexPrefill(BlockSparse):
    """Per head either vertical lines and slashes, or blocks picked from pooled scores.

    The last `block` queries stand for all: their attention says how many key blocks and block
    diagonals cover a share `gamma` of the mass, between `min_budget` and `max_budget` tokens. A
    head whose pooled estimate is nearer than `tau` to the observed mass (square root of the
    Jensen-Shannon divergence) picks single blocks by that estimate. `slash_cover` block diagonals
    (1 or 2) stand for the distances of one bucket. gamma >= 1 is dense attention.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512
    max_budget: int | None = None
    slash_cover: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_block("min_budget", self.min_budget)
        if self.max_budget is not None and self.max_budget < self.min_budget:
            want = f"at least min_budget {self.min_budget}"
            raise ValueError(f"max_budget must be {want}, got {self.max_budget}")
        if self.gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")
        if self.tau < 0:
            raise ValueError(f"tau must be at least 0, got {self.tau}")
        if self.slash_cover not in (1, 2):
            raise ValueError(f"slash_cover must be 1 or 2, got {self.slash_cover}")

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout | None:
        """The blocks of every head's pattern; block 0 and the diagonal always."""
        lengths, b = (q.shape[2], k.shape[2]), self.block
        least = -(-self.min_budget // b)
        if self.gamma >= 1 or lengths[1] <= b * max(2, least):
            return None
        factor = default_scale(call.scale, q.shape[3])
        vertical, slash = _observe(q[:, :, -b:], k, factor, call.softcap)
        columns, bands = _block_sums(vertical, b), _block_sums(slash, b)
        k_mean = ops.pool_blocks(k, b)
        q_last = ops.pool_blocks(q[:, :, -b:], b)
        guess = torch.softmax(ops.grouped_logits(q_last, k_mean, factor), -1).squeeze(2)
        aware = _distance(guess, columns) < self.tau
        grid = ops.TileGrid.of(*lengths, b)
        visible = ops.causal_map(lengths, (b, b)).to(q.device)
        lines = self._lines(columns, bands, self._budget(vertical), self._budget(slash), grid)
        if aware.any():
            floor = torch.full(aware.shape, min(least, columns.shape[-1]), device=q.device)
            scores = ops.grouped_logits(ops.pool_blocks(q, b, lead=grid.lead), k_mean, factor)
            probs = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
            blocks = ops.top_p(probs, self.gamma, crossing="exclude", scope="head", visible=visible)
            blocks = blocks | self._lines(columns, bands, floor, floor, grid)
            lines = torch.where(aware[..., None, None], blocks, lines)
        return ops.from_map(lines & visible, b, lengths)

    def _budget(self, mass: Tensor) -> Tensor:
        """Blocks that hold the tokens covering `gamma`: token mass (B, H, L) -> (B, H)."""
        b, n = self.block, -(-mass.shape[-1] // self.block)
        covered = mass.sort(-1, descending=True).values.cumsum(-1) <= self.gamma
        most = n if self.max_budget is None else min(n, -(-self.max_budget // b))
        return ((1 + covered.sum(-1)) // b + 1).clamp(min(n, -(-self.min_budget // b)), most)

    def _lines(
        self, columns: Tensor, bands: Tensor, n_columns: Tensor, n_bands: Tensor, grid: ops.TileGrid
    ) -> Tensor:
        """Block map (B, H, nQ, nK) of the heaviest columns and block diagonals, 0 among them."""
        kept = []
        for mass, count in ((columns, n_columns), (bands, n_bands)):
            mass = mass.clone()
            mass[..., 0] = float("inf")
            kept.append(ops.top_k(mass, count))
        column, band = kept
        if self.slash_cover == 2:
            band = band | pad(band, (1, 0))[..., :-1]
        at = torch.arange(column.shape[-1], device=column.device)
        rows = at[grid.first : grid.first + grid.tiles, None]
        return column[..., None, :] | band[..., (rows - at).clamp_min(0)]


def _observe(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Mean attention of the last queries by key and by distance: two (B, Hq, L) of sum 1."""
    r, length, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    at = torch.arange(r, device=q.device)
    future = at > r - 1 - at[:, None]
    wide = torch.promote_types(q.dtype, torch.float32)
    probs = q.new_zeros(q.shape[0], 1, r, length + r, dtype=wide)
    # Row i is the query at L-1-i: moved i to the right, its key at distance d meets L-1-d.
    skewed = probs.flatten(2)[..., :-r].unflatten(2, (r, length + r - 1))[..., :length]
    vertical, slash = [], []
    for h, head in enumerate(q.flip(2).split(1, dim=1)):
        scores = cap(ops.grouped_logits(head, k[:, h // group, None], scale), softcap)
        scores[..., length - r :].masked_fill_(future, float("-inf"))
        probs[..., :length] = torch.softmax(scores, -1)
        vertical.append(probs[..., :length].mean(2))
        slash.append(skewed.mean(2).flip(-1))
    return torch.cat(vertical, 1), torch.cat(slash, 1)


def _block_sums(mass: Tensor, block: int) -> Tensor:
    """Mass by block: (B, H, L) -> (B, H, n)."""
    return pad(mass, (0, -mass.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural log) over the last axis."""
    mid = (p + q) / 2
    gap = torch.xlogy(p, p) + torch.xlogy(q, q) - torch.xlogy(p + q, mid)
    return (gap.sum(-1) / 2).clamp_min(0).sqrt()
