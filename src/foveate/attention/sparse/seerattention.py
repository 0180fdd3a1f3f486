"""SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs (2024, paper 139)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.attention._trained import Learner, ModelShape, Trainable
from foveate.attention.base import BlockSparse, Call
from foveate.ops import BlockLayout
from foveate.registry import Card, register


@register(
    Card(
        name="seerattention",
        title="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
        year=2024,
        paper=139,
        claim="a small gate that learned each layer's block-max attention map picks blocks better "
        "than static or pooled patterns",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="approximate",
        phases=("prefill",),
        selection_causal=False,
        cost="O(L·D + (L/block)²·D) to choose, density·L²·D to attend; O(L·D) memory",
        decoding="dense over the full cache",
        confidence="high: official code; the gate starts from mean pooling, which is our choice",
        small={"block": 16, "threshold": 0.1, "last_rows": 1},
        full={"threshold": -1.0},
    )
)
@dataclass(frozen=True, kw_only=True)
class SeerAttention(BlockSparse, Trainable):
    """The blocks to which a gate gives at least `threshold`, and each query's own block.

    The gate is a causal softmax over blocks of q·W k, q the mean and k the maximum, minimum and
    mean of a block before rotation, rotated to the block's first position; W, one matrix for each
    layer and query head, is in the file `gate` that `foveate train` writes ("": plain means).
    `ratio`, if given, keeps that share of the causal blocks instead; the last `last_rows` blocks
    of queries read everything. A threshold below 0 is dense attention.
    """

    trained: ClassVar[str] = "gate"

    block: int = 64
    threshold: float = 2e-3
    ratio: float | None = None
    last_rows: int = 2
    gate: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be a share in (0, 1], got {self.ratio}")
        if self.last_rows < 0:
            raise ValueError(f"last_rows must be at least 0, got {self.last_rows}")
        held = self.read()
        if held is not None:
            held.check_options(block=self.block)
            shape = held.shape
            key = (shape.layers, shape.q_heads, 3 * shape.dim, shape.dim)
            held.check_tensors("gate", key=key)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout | None:
        """What the gate lets through, the diagonal and the last rows."""
        lengths = (q.shape[2], k.shape[2])
        if (self.threshold < 0 and self.ratio is None) or self.ratio == 1:
            return None
        gate = _gate(_pooled(q, k, call, self.block), self._weights(q, k, call))
        visible = ops.causal_map(lengths, (self.block, self.block)).to(q.device)
        if self.ratio is None:
            chosen = ops.threshold(gate, self.threshold, visible=visible)
        else:
            kept = math.floor((1 - math.sqrt(1 - self.ratio)) * gate.shape[-1])
            chosen = ops.top_k(gate, max(kept, 1), visible=visible)
        chosen = ops.force(chosen, visible, local=1, last_rows=self.last_rows)
        return ops.from_map(chosen, self.block, lengths)

    def _weights(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """The gate's matrices (Hq, 3 D, D) in this layer."""
        held = self.read()
        if held is None:
            return _means_only(q.shape[1], q.shape[3]).to(q.device)
        held.check_model(ModelShape.of(q, k, call))
        return held.weights["key"][call.layer].to(q.device)

    def learner(self, shape: ModelShape) -> Learner:
        """A gate for every layer, at first as it is without a file."""
        return Distilled(shape, self.block)


class Pooled(NamedTuple):
    """What the gate sees of a call, by block.

    q (B, Hq, nQ, D) means, k (B, Hkv, nK, 3 D) maxima, minima and means, both before rotation;
    tables of the blocks' first positions, those of the keys; first is the index of q's first block.
    """

    q: Tensor
    k: Tensor
    tables: tuple[Tensor, Tensor] | None
    first: int
    visible: Tensor


def _pooled(q: Tensor, k: Tensor, call: Call, block: int) -> Pooled:
    """Pool the queries and keys of a call."""
    lengths = (q.shape[2], k.shape[2])
    grid, tables = ops.TileGrid.of(*lengths, block), call.tables(lengths[1])
    if tables is not None:
        cos, sin = tables
        q = ops.unrope(q, cos[:, -lengths[0] :], sin[:, -lengths[0] :])
        k = ops.unrope(k, cos, sin)
        tables = (cos[:, ::block], sin[:, ::block])
    keys = torch.cat([ops.pool_blocks(k, block, mode=m) for m in ("max", "min", "mean")], -1)
    queries = ops.pool_blocks(q, block, lead=grid.lead)
    visible = ops.causal_map(lengths, (block, block)).to(q.device)
    return Pooled(queries, keys, tables, grid.first, visible)


def _gate(seen: Pooled, weights: Tensor) -> Tensor:
    """Shares (B, Hq, nQ, nK) of the visible key blocks, rows sum to 1; weights (Hq, 3 D, D)."""
    group = seen.q.shape[1] // seen.k.shape[1]
    q, k = seen.q, seen.k.repeat_interleave(group, 1) @ weights.to(seen.k.dtype)
    if seen.tables is not None:
        cos, sin = seen.tables
        at = slice(seen.first, seen.first + q.shape[2])
        q, k = ops.rope(q, cos[:, at], sin[:, at]), ops.rope(k, cos, sin)
    logits = ops.grouped_logits(q, k, q.shape[3] ** -0.5)
    return torch.softmax(logits.masked_fill(~seen.visible, float("-inf")), -1)


def _means_only(heads: int, dim: int) -> Tensor:
    """Weights (heads, 3 D, D) that pass on the mean of a block."""
    own = torch.cat([torch.zeros(2 * dim, dim), torch.eye(dim)])
    return own.expand(heads, -1, -1)


class Distilled(Learner):
    """Gates of all layers, taught the largest attention probability of every block."""

    def __init__(self, shape: ModelShape, block: int) -> None:
        super().__init__()
        first = _means_only(shape.q_heads, shape.dim)
        self.key = nn.Parameter(first.expand(shape.layers, -1, -1, -1).clone())
        self.block, self.turn = block, 0
        self.notes: dict[int, list[tuple[Pooled, Tensor]]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Dense attention; notes what the gate sees and what it should say."""
        with torch.no_grad():
            out, lse = ops.attend(q, k, v, return_lse=True, **call.options())
            most: dict[str, Any] = {"reduce_q": "max", "reduce_k": "max"}
            mass = ops.block_mass(q, k, lse, self.block, **most, **call.options())
            target = mass / mass.sum(-1, keepdim=True).clamp_min(1e-12)
            note = (_pooled(q, k, call, self.block), target)
        self.notes.setdefault(call.layer, []).append(note)
        return out

    def loss(self, done: float, text: Tensor | None, task: int) -> Tensor:
        """Ten times the mean of target · log(target / gate), first quarter left out, all layers."""
        total = self.key.new_zeros(())
        for layer, notes in self.notes.items():
            seen, target = notes[self.turn % len(notes)]
            gate, late = _gate(seen, self.key[layer]), target.shape[2] // 4
            gap = target.xlogy(target) - target.xlogy(gate.clamp_min(1e-20))
            total = total + 10 * gap[:, :, late:].mean()
        self.turn += 1
        return total
