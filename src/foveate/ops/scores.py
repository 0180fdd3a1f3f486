"""Scores of blocks and tokens: pooled means, exact masses, observed attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.ops.api import attend
from foveate.ops.mask import Mask
from foveate.ops.mask import causal as causal_mask
from foveate.ops.measure import attend_T
from foveate.ops.shapes import TileGrid, check_block, check_causal, check_qkv, positions
from foveate.ops.tile import cap, default_scale, grouped_logits

# Logits of one step of a second pass.
_PAIRS = 1 << 22


def _pick(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def _check_valid(name: str, valid: Tensor | None, batch: int, length: int) -> None:
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (batch, length)):
        raise ValueError(
            f"{name} must be a bool tensor ({batch}, {length}), True = real token, "
            f"got {valid.dtype} {tuple(valid.shape)}"
        )


def pool_blocks(
    x: Tensor,
    block: int,
    *,
    valid: Tensor | None = None,
    mode: str = "mean",
    lead: int = 0,
) -> Tensor:
    """Pool tokens by block: x (B, H, L, D) -> (B, H, n, D) float32, over real tokens only.

    valid (B, L) bool leaves out padding; `lead` is the number of rows of the first block that lie
    before x (blocks are cut on absolute positions); mode is mean, max or min. A block without a
    real token pools to 0.
    """
    check_block("block", block)
    _pick("mode", mode, ("mean", "max", "min"))
    b, h, length, d = x.shape
    _check_valid("valid", valid, b, length)
    n = -(-(lead + length) // block)
    tail = n * block - lead - length
    if valid is None and mode == "mean":
        return _means(x, block, min(-lead % block, length))
    real = x.new_ones(b, length, dtype=torch.bool) if valid is None else valid
    real = torch.nn.functional.pad(real, (lead, tail)).view(b, 1, n, block, 1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    tiles = torch.nn.functional.pad(wide, (0, 0, lead, tail)).view(b, h, n, block, d)
    if mode == "mean":
        return tiles.masked_fill(~real, 0.0).sum(3) / real.sum(3).clamp_min(1)
    sign = 1.0 if mode == "max" else -1.0
    best = (tiles * sign).masked_fill(~real, float("-inf")).amax(3) * sign
    return best.masked_fill(~real.any(3), 0.0)


def _means(x: Tensor, block: int, first: int) -> Tensor:
    """Means of the first (ragged) block of `first` rows, of the whole blocks, and of the rest."""
    wide = torch.promote_types(x.dtype, torch.float32)
    whole = (x.shape[2] - first) // block * block
    head, body, rest = x.split((first, whole, x.shape[2] - first - whole), 2)
    ragged = [p.mean(2, True, dtype=wide) if p.shape[2] else p.to(wide) for p in (head, rest)]
    return torch.cat([ragged[0], body.unflatten(2, (-1, block)).mean(3, dtype=wide), ragged[1]], 2)


def _reduce(x: Tensor, how: str, dim: int) -> Tensor:
    if how == "sum":
        return x.sum(dim)
    return x.amax(dim) if how == "max" else x.mean(dim)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block: int | tuple[int, int],
    *,
    reduce_q: str = "sum",
    reduce_k: str = "sum",
    entry: Callable[[Tensor, Tensor], Tensor] | None = None,
    causal: bool = True,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Exact attention mass of blocks, from a second pass over the logits.

    lse (B, Hq, Lq) is that of the same attention. Returns (B, Hq, nQ, nK) float32, or
    (B, Hq, Lq, nK) with reduce_q "none". reduce_q is sum, max, mean (over real rows) or none;
    reduce_k sum or max; `entry(p, s)` >= 0 may replace the probability p = exp(s - lse). Pairs
    that are not visible count 0.
    """
    _pick("reduce_q", reduce_q, ("sum", "max", "mean", "none"))
    _pick("reduce_k", reduce_k, ("sum", "max"))
    bq, bk = (block, block) if isinstance(block, int) else block
    shape = check_qkv(q, k)
    check_causal(shape.q_len, shape.k_len, causal)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    rule = mask if not causal else (causal_mask() if mask is None else mask & causal_mask())
    q_pos, k_pos = positions(shape.q_len, shape.k_len, None, None, q.device)
    grid = TileGrid.of(shape.q_len, shape.k_len, check_block("block rows", bq))
    n_k = -(-shape.k_len // check_block("block keys", bk))
    factor = default_scale(scale, shape.dim)
    tiles = []
    for t in range(grid.tiles):
        lo = max(t * bq - grid.lead, 0)
        rows = slice(lo, min((t + 1) * bq - grid.lead, shape.q_len))
        s = cap(grouped_logits(q[:, :, rows], k, factor), softcap)
        seen = torch.ones((), dtype=torch.bool, device=q.device)
        if rule is not None:
            seen = rule(*rule.axes(q.device), q_pos[:, None, rows, None], k_pos[:, None, None])
        base = lse[:, :, rows, None]
        p = torch.exp(s - base.masked_fill(torch.isinf(base), float("inf")))
        p = (p if entry is None else entry(p, s)).masked_fill(~seen, 0.0)
        p = torch.nn.functional.pad(p, (0, n_k * bk - shape.k_len))
        p = _reduce(p.view(*p.shape[:3], n_k, bk), reduce_k, -1)
        tiles.append(p if reduce_q == "none" else _reduce(p, reduce_q, 2)[:, :, None])
    return torch.cat(tiles, 2)


def token_scores(
    q: Tensor,
    k: Tensor,
    *,
    valid: Tensor | None = None,
    q_valid: Tensor | None = None,
    causal: bool = True,
    softmax: bool = True,
    over: str = "mean",
    group: str = "mean",
    heads: str = "none",
    pool: int = 0,
    pool_mode: str = "avg",
    scale: float | None = None,
) -> Tensor:
    """How much the queries (the last Lq positions) attend to each key: (B, Hkv or 1, Lk) float32.

    Rows are softmaxed (or raw scaled logits), reduced over queries (`over`: mean, sum, max or
    last), over the query heads of a kv head (`group`: mean, sum, max), optionally over all kv
    heads (`heads`: none or sum), then pooled along the keys with an odd `pool` window (avg or
    max). valid (B, Lk) marks real keys: others score -inf and are never pooled in; q_valid
    (B, Lq) marks real queries: others add nothing.
    """
    _pick("over", over, ("mean", "sum", "max", "last"))
    _pick("group", group, ("mean", "sum", "max"))
    _pick("heads", heads, ("none", "sum"))
    _pick("pool_mode", pool_mode, ("avg", "max"))
    if pool and pool % 2 == 0:
        raise ValueError(f"pool must be odd (or 0 for none), got {pool}")
    shape = check_qkv(q, k)
    check_causal(shape.q_len, shape.k_len, causal)
    _check_valid("valid", valid, shape.batch, shape.k_len)
    _check_valid("q_valid", q_valid, shape.batch, shape.q_len)
    if over == "last":
        q, q_valid = q[:, :, -1:], None if q_valid is None else q_valid[:, -1:]
    whole = valid is None and q_valid is None and shape.q_len == shape.k_len
    if whole and softmax and over in ("sum", "mean"):
        scores = _received(q, k, causal, scale) / (1 if over == "sum" else shape.q_len)
    else:
        options = causal, softmax, over, scale
        scores = torch.stack(
            [
                _observed(q[b : b + 1], k[b : b + 1], valid, q_valid, b, *options)
                for b in range(shape.batch)
            ]
        )
    scores = scores.view(shape.batch, shape.kv_heads, shape.group, shape.k_len)
    scores = _reduce(scores, group, 2)
    if heads == "sum":
        scores = scores.sum(1, keepdim=True)
    if pool > 1:
        scores = _smooth(scores, valid, pool, pool_mode)
    return scores if valid is None else scores.masked_fill(~valid[:, None], float("-inf"))


def _received(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    """The weight (B, Hq, Lk) that every key gets from all queries, by two passes of the kernels."""
    nothing = k.new_zeros(*k.shape[:3], 8)
    _, lse = attend(q, k, nothing, causal=causal, scale=scale, return_lse=True)
    return attend_T(q, k, lse, causal=causal, scale=scale)[..., 0]


def _observed(
    q: Tensor,
    k: Tensor,
    valid: Tensor | None,
    q_valid: Tensor | None,
    row: int,
    is_causal: bool,
    softmax: bool,
    over: str,
    scale: float | None,
) -> Tensor:
    """Scores of one batch row reduced over its queries: (Hq, Lk)."""
    lq, lk = q.shape[2], k.shape[2]
    factor = default_scale(scale, q.shape[3])
    step = max(1, _PAIRS // (q.shape[1] * lk))
    total = None
    count = 0
    for lo in range(0, lq, step):
        rows = torch.arange(lo, min(lo + step, lq), device=q.device)
        if q_valid is not None:
            rows = rows[q_valid[row, rows]]
        if rows.numel() == 0:
            continue
        s = grouped_logits(q[:, :, rows], k, factor)[0]
        hidden = None if valid is None else ~valid[row]
        if is_causal and lq > 1:
            later = torch.arange(lk, device=q.device) > rows[:, None] + lk - lq
            hidden = later if hidden is None else later | hidden
        if hidden is not None:
            s = s.masked_fill(hidden, float("-inf"))
        if softmax:
            s = torch.softmax(s, -1)
            s = s if hidden is None else s.nan_to_num(0.0)
        if over != "max" and hidden is not None:
            s = s.masked_fill(hidden, 0.0)
        part = s.amax(1) if over == "max" else s.sum(1)
        if total is None:
            total = part
        else:
            total = torch.maximum(total, part) if over == "max" else total + part
        count += rows.numel()
    if total is None:
        return q.new_zeros(q.shape[1], lk, dtype=torch.float32)
    if not softmax:
        total = total.masked_fill(torch.isinf(total), 0.0)  # raw logits of a key that no query saw
    return total / count if over == "mean" else total


def _smooth(scores: Tensor, valid: Tensor | None, pool: int, mode: str) -> Tensor:
    """Average or maximum over a window of neighbouring keys, real ones only."""
    if mode == "max":
        hidden = scores if valid is None else scores.masked_fill(~valid[:, None], float("-inf"))
        return torch.nn.functional.max_pool1d(hidden, pool, 1, pool // 2)
    if valid is None:
        ones = scores.new_ones(1, 1, scores.shape[-1])
    else:
        ones = valid[:, None].to(scores.dtype)
    total = torch.nn.functional.avg_pool1d(scores * ones, pool, 1, pool // 2)
    return total / torch.nn.functional.avg_pool1d(ones, pool, 1, pool // 2).clamp_min(1e-12)
