"""SpargeAttn: a universal two-stage block filter for any model (2025, paper 180)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import BlockSparse, Call, Result, dense_result
from foveate.ops import BlockLayout
from foveate.ops.tile import default_scale
from foveate.registry import Card, register

PerHead = float | tuple[float, ...]
"""One number for all query heads, or one for each."""


@register(
    Card(
        name="spargeattn",
        title="SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any "
        "Model Inference",
        year=2025,
        paper=180,
        claim="mean-pooled scores, trusted only where a block is self-similar, and an online "
        "softmax test skip more than half of the work on language, images and video",
        kind="attention",
        family="sparse",
        patterns=("causal self", "noncausal self", "noncausal cross"),
        pretrained="approximate",
        phases=("prefill",),
        selection_causal=False,
        cost="O(L·D + L²/(block·key_block)·D) to choose, density·L²·D to attend; O(L·D) memory",
        decoding="dense over the full cache",
        confidence="high: official selection code; its first column is optional there, on here",
        small={"block": 16, "key_block": 8, "topk": 0.3, "rows": 16},
        full={"topk": 1.0, "skip": math.inf},
    )
)
@dataclass(frozen=True, kw_only=True)
class SpargeAttn(BlockSparse):
    """Blocks of pooled scores between self-similar blocks, minus what proves too small on the way.

    A block is self-similar if the mean cosine of its pairs exceeds `theta`; other key blocks and
    the rows of other query blocks are read whole. Between self-similar blocks every row keeps
    the share `topk` of all key blocks or, with `tau`, the best ones up to that probability.
    Then `rows` queries skip a block whose logits stay `skip` (natural log) below their maximum so
    far. `smooth` takes the mean key off before pooling, `sink` keeps the first key block. theta,
    topk, tau and skip may be tuples, one value per query head.
    """

    key_block: int = 64
    topk: PerHead = 0.5
    tau: PerHead | None = None
    theta: PerHead = -0.1
    skip: PerHead = 50 * math.log(2)
    rows: int = 16
    smooth: bool = True
    sink: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_block("key_block", self.key_block)
        if self.block % ops.check_block("rows", self.rows):
            raise ValueError(f"rows must divide the block of {self.block}, got {self.rows}")
        for name, low in (("topk", 0.0), ("tau", 0.0), ("theta", -1.0), ("skip", 0.0)):
            value = getattr(self, name)
            above = math.nextafter(low, 1) if name in ("topk", "tau") else low
            for x in value if isinstance(value, tuple) else () if value is None else (value,):
                if not x >= above:
                    bound = "above" if above > low else "at least"
                    raise ValueError(f"{name} must be {bound} {low:g}, got {value}")

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Block-sparse attention; heads of different `skip` run one after the other."""
        layout = self.select(q, k, call)
        if layout is None:
            return dense_result(q, k, v, call)
        limits, parts = _per_head("skip", self.skip, q), []
        for limit in limits.unique().tolist():
            here = (limits == limit).view(1, -1, 1)
            own = dataclasses.replace(layout, counts=layout.counts * here)
            rule = None if math.isinf(limit) else (limit, self.rows)
            out = ops.block_sparse(q, k, v, own, skip=rule, return_lse=True, **call.options())
            parts.append(out)
        return Result(*(parts[0] if len(parts) == 1 else ops.merge(parts)), layout)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout | None:
        """The blocks that stage one keeps, None for all of them without an online test."""
        share = _per_head(*(("topk", self.topk) if self.tau is None else ("tau", self.tau)), q)
        if bool((share >= 1).all()) and self.skip == math.inf:
            return None
        lengths, size = (q.shape[2], k.shape[2]), (self.block, self.key_block)
        lead = ops.TileGrid.of(*lengths, self.block).lead
        keys = k.float() - k.float().mean(2, keepdim=True) if self.smooth else k.float()
        theta = _per_head("theta", self.theta, q)[:, None]
        similar_q = _self_similarity(q.float(), self.block, lead) > theta
        similar_k = _self_similarity(keys, self.key_block, 0)
        similar_k = similar_k.repeat_interleave(q.shape[1] // k.shape[1], 1) > theta
        pooled = ops.pool_blocks(q, self.block, lead=lead), ops.pool_blocks(keys, self.key_block)
        logits = ops.grouped_logits(*pooled, default_scale(call.scale, q.shape[3]))
        visible = ops.causal_map(lengths, size).to(q.device)
        if not call.causal:
            visible = torch.ones_like(visible)
        trusted = visible & similar_k[:, :, None]
        probs = torch.softmax(logits.masked_fill(~trusted, -math.inf), -1).nan_to_num(0)
        if self.tau is None:
            count = (share * logits.shape[-1]).int().clamp_min(1)
            chosen = ops.top_k(probs, count[:, None], visible=visible)
        else:
            chosen = ops.top_p(probs, share[:, None], crossing="exclude", visible=visible)
        chosen = chosen | ~similar_k[:, :, None] | ~similar_q[..., None]
        return ops.from_map(ops.force(chosen, visible, first=int(self.sink)), size, lengths)


@torch.no_grad()
def tune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: SpargeAttn,
    *,
    causal: bool = True,
    l1: float = 0.06,
    l2: float = 0.07,
    thetas: Sequence[float] = tuple(i / 16 for i in range(-16, 17)),
) -> SpargeAttn:
    """`base` with theta, tau and skip of every head set on a sample q, k, v of one layer.

    For each theta the smallest tau (to 1e-3) at which a head's output differs by less than `l1`
    (relative L1) is found; the theta that reads the fewest pairs wins, then the smallest skip
    with a difference below `l2`. A head that would read 0.9 of the visible pairs becomes dense.
    """
    want, ones = ops.attend(q, k, v, causal=causal), torch.ones(q.shape[1])
    size = want.abs().sum((0, 2, 3))

    def made(*options: Tensor) -> SpargeAttn:
        theta, tau, skip = (tuple(x.tolist()) for x in options)
        return dataclasses.replace(base, theta=theta, tau=tau, skip=skip)

    def error(mechanism: SpargeAttn) -> Tensor:
        return (mechanism(q, k, v, causal=causal) - want).abs().sum((0, 2, 3)) / size

    best_theta, best_tau, fewest, never = ones, ones, ones, ones * math.inf
    for theta in (ones * x for x in thetas):
        tau = _smallest(lambda x, t=theta: error(made(t, x, never)) < l1, ones)  # type: ignore[misc]
        layout = made(theta, tau, never).select(q, k, Call(causal=causal))
        read = ones if layout is None else _density_by_head(layout, causal)
        better = read < fewest
        fewest = torch.where(better, read, fewest)
        best_theta = torch.where(better, theta, best_theta)
        best_tau = torch.where(better, tau, best_tau)
    dense = fewest >= 0.9
    best_tau = best_tau.masked_fill(dense, 1.0)
    skip = _smallest(lambda x: error(made(best_theta, best_tau, x)) < l2, 64 * ones)
    return made(best_theta, best_tau, skip.masked_fill(dense, math.inf))


def _smallest(passes: Callable[[Tensor], Tensor], high: Tensor) -> Tensor:
    """By bisection to 1e-3 the smallest values up to `high`, which passes, that pass."""
    low = torch.zeros_like(high)
    while float((high - low).max()) > 1e-3:
        middle = (low + high) / 2
        fine = passes(middle)
        low, high = torch.where(fine, low, middle), torch.where(fine, middle, high)
    return high


def _density_by_head(layout: BlockLayout, causal: bool) -> Tensor:
    """Share of the visible pairs that each head (Hq,) reads."""
    pairs = ops.visible_pairs(layout.lengths, layout.block, causal)
    read = layout.to_bool() * pairs
    return read.sum((0, 2, 3)) / (pairs.sum() * read.shape[0])


def _per_head(name: str, value: PerHead, q: Tensor) -> Tensor:
    """An option as one number per query head (Hq,)."""
    if isinstance(value, tuple) and len(value) != q.shape[1]:
        raise ValueError(f"{name} must hold {q.shape[1]} values, one per head, got {len(value)}")
    wide = torch.tensor(value, device=q.device, dtype=torch.float64)
    return wide.expand(q.shape[1])


def _self_similarity(x: Tensor, block: int, lead: int) -> Tensor:
    """Mean cosine over all pairs of a block, at most 1: x (B, H, L, D) -> (B, H, n)."""
    # The mean cosine of all pairs is the squared length of the mean of the unit vectors.
    unit = torch.nn.functional.normalize(x, dim=-1)
    return ops.pool_blocks(unit, block, lead=lead).square().sum(-1).clamp_max(1)
