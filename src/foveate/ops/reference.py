"""Plain, slow, obviously right forms of the primitives; the fast paths are held to them."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from foveate.ops.layout import BlockLayout
from foveate.ops.mask import Mask, causal
from foveate.ops.normalizers import Normalizer, Softmax, Stats
from foveate.ops.shapes import TileGrid, positions, query_offset
from foveate.ops.skip import Skip
from foveate.ops.tile import default_scale


def logits(
    q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None, softcap: float | None
) -> Tensor:
    """Logits (B, Hq, Lq, Lk), keys repeated, in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.to(wide) @ keys.transpose(-1, -2) * default_scale(scale, q.shape[3])
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    return s if bias is None else s + bias


def visible_pairs(
    q: Tensor,
    k: Tensor,
    mask: Mask | None,
    is_causal: bool,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
) -> Tensor:
    """Bool tensor that broadcasts to (B, Hq, Lq, Lk)."""
    lq, lk = q.shape[2], k.shape[2]
    qp, kp = positions(lq, lk, q_pos, k_pos, q.device)
    seen = torch.ones(1, 1, lq, lk, dtype=torch.bool, device=q.device)
    for rule in (mask, causal() if is_causal else None):
        if rule is not None:
            seen = seen & rule.to_dense(lq, lk, q_pos=qp, k_pos=kp, device=q.device)
    return seen


def values_of(s: Tensor, v: Tensor) -> Tensor:
    """Values repeated for the query heads of logits."""
    return v.to(s.dtype).repeat_interleave(s.shape[1] // v.shape[1], 1)


def softmax_rows(s: Tensor, seen: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of whole rows of logits: outputs and lse."""
    s = s.masked_fill(~seen, -math.inf)
    empty = ~seen.expand_as(s).any(-1, keepdim=True)
    weights = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty | ~seen, 0.0)
    return weights @ values_of(s, v), torch.logsumexp(s, -1)


def normalized_rows(
    s: Tensor, seen: Tensor, v: Tensor, normalizer: Normalizer
) -> tuple[Tensor, Stats]:
    """Attention of whole rows of logits under any normaliser: outputs and statistics."""
    seen = seen.expand_as(s)
    s = s.masked_fill(~seen, -math.inf)
    stats, _ = normalizer.update(normalizer.init(s.new_zeros(*s.shape[:-1], 1)), s, seen)
    weights = normalizer.weight(s, stats).masked_fill(~seen, 0.0)
    return normalizer.finish(weights @ values_of(s, v), stats), stats


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None,
    is_causal: bool,
    scale: float | None,
    bias: Tensor | None,
    softcap: float | None,
    normalizer: Normalizer,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`attend` with the whole matrix of weights."""
    s = logits(q, k, scale, bias, softcap)
    seen = visible_pairs(q, k, mask, is_causal, q_pos, k_pos)
    if isinstance(normalizer, Softmax):
        out, lse = softmax_rows(s, seen, v)
        return out.to(q.dtype), lse
    out, stats = normalized_rows(s, seen, v, normalizer)
    return out.to(q.dtype), normalizer.lse(stats) if return_lse else None


def expand_layout(layout: BlockLayout, q_heads: int) -> Tensor:
    """Which pairs a layout reads: bool (1|B, 1|Hq, Lq, Lk)."""
    (lq, lk), (bq, bk) = layout.lengths, layout.block
    grid = TileGrid.of(lq, lk, bq)
    pairs = layout.to_bool().repeat_interleave(bq, 2).repeat_interleave(bk, 3)
    pairs = pairs[:, :, grid.lead : grid.lead + lq, :lk]
    heads = pairs.shape[1]
    return pairs if heads == 1 else pairs.repeat_interleave(q_heads // heads, 1)


def block_sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    mask: Mask | None,
    is_causal: bool,
    scale: float | None,
    bias: Tensor | None,
    softcap: float | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    skip: Skip | None = None,
) -> tuple[Tensor, Tensor]:
    """`block_sparse` as dense attention under the layout's mask of pairs."""
    s = logits(q, k, scale, bias, softcap)
    seen = visible_pairs(q, k, mask, is_causal, q_pos, k_pos)
    seen = seen & expand_layout(layout, q.shape[1]).to(q.device)
    if skip is not None:
        seen = without_skipped(s, seen, layout, skip)
    out, lse = softmax_rows(s, seen, v)
    return out.to(q.dtype), lse


def without_skipped(s: Tensor, seen: Tensor, layout: BlockLayout, skip: Skip) -> Tensor:
    """The pairs that stay when blocks are skipped, row group by row group and block by block."""
    (lq, lk), bk, (threshold, rows) = layout.lengths, layout.block[1], skip
    s = s.masked_fill(~seen, -math.inf)
    stay = torch.zeros_like(seen.expand_as(s))
    edges = range(-(query_offset(lq, lk) % rows), lq, rows)
    for group in (slice(max(lo, 0), min(lo + rows, lq)) for lo in edges):
        for b, h in product(range(s.shape[0]), range(s.shape[1])):
            running = torch.full_like(s[b, h, group, 0], -math.inf)
            for lo in range(0, lk, bk):
                local = s[b, h, group, lo : lo + bk].amax(-1)
                gaps = [x - y for x, y in zip(local, running, strict=True) if x > -math.inf]
                if gaps and max(gaps) > -threshold:
                    stay[b, h, group, lo : lo + bk] = True
                    running = torch.maximum(running, local)
    return seen & stay


def gather_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    valid: Tensor | None,
    *,
    width: int,
    scale: float | None,
    bias: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`gather` as dense attention in which a pair counts as often as it is listed."""
    b, hq, lq, _ = q.shape
    lk = k.shape[2]
    times = torch.zeros(b, hq, lq, lk, device=q.device)
    listed = torch.ones_like(idx, dtype=torch.bool) if valid is None else valid
    full = (b, idx.shape[1], lq, idx.shape[3])
    lists, listed = idx.expand(full), listed.expand(full)
    per = hq // idx.shape[1]
    for m in range(idx.shape[3]):
        for w in range(width):
            token = (lists[..., m] * width + w).repeat_interleave(per, 1)
            real = (token < lk) & listed[..., m].repeat_interleave(per, 1)
            token = token.clamp_max(lk - 1)[..., None].long()
            times.scatter_add_(-1, token, real[..., None].float())
    s = logits(q, k, scale, bias, softcap)
    out, lse = softmax_rows(s + times.log().to(s.dtype), times > 0, v)
    return out.to(q.dtype), lse


def merge_reference(
    parts: list[tuple[Tensor, Tensor]], gamma: list[float] | None = None
) -> tuple[Tensor, Tensor]:
    """`merge` in float64 straight from its definition."""
    powers = [1.0] * len(parts) if gamma is None else gamma
    weights = [torch.exp(g * lse.double()) for g, (_, lse) in zip(powers, parts, strict=True)]
    total = torch.stack(weights).sum(0)
    mixed = torch.stack(
        [w[..., None] * out.double() for w, (out, _) in zip(weights, parts, strict=True)]
    ).sum(0)
    out = torch.where(total[..., None] > 0, mixed / total[..., None], 0.0)
    return out, total.log()


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """`rope` as a product of complex numbers, tables (L, R)."""
    r = cos.shape[-1]
    turning = x[..., :r].double()
    if interleaved:
        z = torch.complex(turning[..., 0::2].contiguous(), turning[..., 1::2].contiguous())
        turn = torch.complex(cos[..., 0::2].double(), sin[..., 0::2].double())
        both = torch.view_as_real(z * turn).flatten(-2)
    else:
        z = torch.complex(turning[..., : r // 2], turning[..., r // 2 :])
        turn = torch.complex(cos[..., : r // 2].double(), sin[..., : r // 2].double())
        both = torch.cat(((z * turn).real, (z * turn).imag), -1)
    return torch.cat((both.to(x.dtype), x[..., r:]), -1)
