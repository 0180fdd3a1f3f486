"""Attention measured without its map: row statistics, column statistics, chosen rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.api import attend
from foveate.ops.mask import Mask, with_causal
from foveate.ops.shapes import Shape, check_causal, check_qkv, positions
from foveate.ops.tile import cap, default_scale, grouped_logits

# Weights of one step of a blockwise pass; minus the logarithm of a weight that is nothing.
_PAIRS, _NOTHING = 1 << 22, 1e30


class RowStats(NamedTuple):
    """Of every row: means (B, Hq, Lq, m) of what was asked, entropy (B, Hq, Lq) in nats, lse."""

    means: Tensor
    entropy: Tensor
    lse: Tensor


def row_stats(
    q: Tensor,
    k: Tensor,
    u: Tensor | None = None,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> RowStats:
    """Every statistic of attention rows that is linear in the weights A, and their entropy.

    u (B, 1|Hkv, Lk, m) are m numbers of each key; means are A u, (B, Hq, Lq, m), in float32 or
    wider. Both come from one attention call whose values are the keys and u: the entropy of a row
    is lse - Σ p s, and Σ p s is the product of its query with its mean key. A row that sees no key
    has means and entropy 0 and lse -inf.
    """
    shape = check_qkv(q, k)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    u = k.new_zeros(shape.batch, 1, shape.k_len, 0) if u is None else u.to(wide)
    _check_u("u", u, shape, shape.k_len, (1, shape.kv_heads))
    factor = default_scale(scale, shape.dim)
    if softcap is not None:
        return _row_stats_blockwise(q, k, u, with_causal(mask, causal), factor, softcap)
    # The entropy stays the same, and precise, when all keys are moved by the same vector.
    centre = k.mean(2, keepdim=True)
    values = _padded(torch.cat((k - centre, u.expand(-1, shape.kv_heads, -1, -1)), -1))
    out, lse = attend(q, k, values, mask=mask, causal=causal, scale=factor, return_lse=True)
    mean_key, means = out[..., : shape.dim], out[..., shape.dim : shape.dim + u.shape[3]]
    centre = centre.repeat_interleave(shape.group, 1)
    entropy = (lse - factor * (q * centre).sum(-1)) - factor * (q * mean_key).sum(-1)
    return RowStats(means, entropy.masked_fill(torch.isinf(lse), 0.0).clamp_min(0), lse)


def attend_T(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    u: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Transposed attention Aᵀ u (B, Hq, Lk, m) from the lse of the same attention.

    u (B, 1|Hq, Lq, m) are m numbers of each query; None is one 1, which gives the mass of every
    column. valid (B, Lk) bool marks the real keys. Rows whose lse is -inf weigh nothing. Without a
    further mask this is attention itself with queries and keys in each other's place: the
    logarithm of the normaliser of a row joins its logits as one more coordinate.
    """
    shape = check_qkv(q, k)
    check_causal(shape.q_len, shape.k_len, causal)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    if valid is not None and valid.shape != (shape.batch, shape.k_len):
        raise ValueError(f"valid must be {(shape.batch, shape.k_len)}, got {tuple(valid.shape)}")
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, lse = q.to(wide), k.to(wide), lse.to(wide)
    if u is not None:
        u = u.to(wide)
        _check_u("u", u, shape, shape.q_len, (1, shape.q_heads))
    factor = default_scale(scale, shape.dim)
    if mask is None and softcap is None and (not causal or shape.q_len == shape.k_len):
        out = _exchanged(q, k, lse, u, causal, factor)
    else:
        out = _attend_T_blockwise(q, k, lse, u, with_causal(mask, causal), factor, softcap)
    return out if valid is None else out * valid[:, None, :, None]


def attention_rows(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The weights (B, Hq, n, Lk) of chosen queries: rows (n,) are their numbers in [0, Lq).

    Costs n·Lk numbers a head; a row that sees no key is 0. Raises IndexError for rows out of range.
    """
    shape = check_qkv(q, k)
    check_causal(shape.q_len, shape.k_len, causal)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < shape.q_len:
        raise IndexError(f"rows must be in [0, {shape.q_len}), got {rows.tolist()}")
    rule = with_causal(mask, causal)
    s = _logits(q, k, rows, rule, default_scale(scale, shape.dim), softcap)
    return torch.softmax(s, -1).nan_to_num(0.0)


def visible_counts(
    q_len: int,
    k_len: int,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How many keys every query sees, (B|1, H|1, Lq), and how many queries see every key.

    rows (B, Lq) bool says which queries count in the latter, (B|1, H|1, Lk). Never an Lq×Lk
    tensor.
    """
    rule = with_causal(mask, causal)
    q_pos, k_pos = positions(q_len, k_len, None, None, torch.device("cpu"))
    counting = torch.ones(1, q_len, dtype=torch.bool) if rows is None else rows.cpu()
    if causal and mask is None:
        ends = torch.nn.functional.pad(counting.long(), (k_len - q_len, 0))
        return (q_pos + 1)[:, None], ends.flip(1).cumsum(1).flip(1)[:, None]
    heads = 1 if rule is None else rule.heads
    batch = max(len(counting), 1 if rule is None else rule.batch)
    keys, queries = [], torch.zeros(batch, heads, k_len, dtype=torch.long)
    for at in torch.arange(q_len).split(max(1, _PAIRS // max(1, batch * heads * k_len))):
        seen = torch.ones(1, 1, len(at), k_len, dtype=torch.bool)
        if rule is not None:
            axes = rule.axes(torch.device("cpu"))
            seen = rule(*axes, q_pos[:, None, at, None], k_pos[:, None, None])
        seen = seen.expand(batch, heads, len(at), k_len)
        keys.append(seen.sum(-1))
        queries += (seen & counting[:, None, at, None]).sum(2)
    return torch.cat(keys, 2), queries


def _check_u(name: str, u: Tensor, shape: Shape, length: int, heads: tuple[int, int]) -> None:
    fits = u.dim() == 4 and u.shape[0] == shape.batch and u.shape[2] == length
    if not fits or u.shape[1] not in heads:
        want = f"({shape.batch}, {' or '.join(map(str, heads))}, {length}, m)"
        raise ValueError(f"{name} must be {want}, got {tuple(u.shape)}")


def _padded(x: Tensor) -> Tensor:
    """A last axis of a multiple of 8, which the kernels need."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))


def _logits(
    q: Tensor, k: Tensor, rows: Tensor, rule: Mask | None, scale: float, softcap: float | None
) -> Tensor:
    """Logits (B, Hq, n, Lk) of chosen rows, -inf where nothing is visible."""
    s = cap(grouped_logits(q[:, :, rows], k, scale), softcap)
    if rule is None:
        return s
    q_pos, k_pos = positions(q.shape[2], k.shape[2], None, None, q.device)
    seen = rule(*rule.axes(q.device), q_pos[:, None, rows, None], k_pos[:, None, None])
    return s.masked_fill(~seen, float("-inf"))


def _steps(q: Tensor, k: Tensor) -> list[Tensor]:
    """Rows of a pass, some at a time."""
    step = max(1, _PAIRS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return list(torch.arange(q.shape[2], device=q.device).split(step))


def _row_stats_blockwise(
    q: Tensor, k: Tensor, u: Tensor, rule: Mask | None, scale: float, softcap: float | None
) -> RowStats:
    """The plain form: logits of some rows at a time."""
    parts = []
    for rows in _steps(q, k):
        s = _logits(q, k, rows, rule, scale, softcap)
        lse = torch.logsumexp(s, -1)
        p = torch.softmax(s, -1).nan_to_num(0.0)
        entropy = lse.nan_to_num(neginf=0.0) - (p * s.masked_fill(p == 0, 0.0)).sum(-1)
        wide = u.repeat_interleave(q.shape[1] // u.shape[1], 1)
        parts.append(RowStats(p @ wide, entropy, lse))
    return RowStats(*(torch.cat(x, 2) for x in zip(*parts, strict=True)))


def _exchanged(
    q: Tensor, k: Tensor, lse: Tensor, u: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Attention of keys to queries: exp(s - lse) are its weights before they are normalised."""
    b, hq, lq, _ = q.shape
    group = hq // k.shape[1]
    last = -torch.where(torch.isinf(lse), _NOTHING, lse)[..., None]
    keys = _padded(torch.cat((q * scale, last), -1))
    queries = _padded(torch.cat((k, torch.ones_like(k[..., :1])), -1))
    width = 0 if u is None else u.shape[3]
    values = q.new_zeros(b, hq, lq, 0) if u is None else u.expand(-1, hq, -1, -1)
    values = torch.nn.functional.pad(values, (0, -width % 8 if width else 8))
    if causal:  # a key is seen by the queries from its own on: the last come first
        queries, keys, values = (x.flip(2) for x in (queries, keys, values))
    outs = []
    for own in range(group):
        heads = slice(own, None, group)
        out, mass = attend(
            queries, keys[:, heads], values[:, heads], causal=causal, scale=1.0, return_lse=True
        )
        weight = mass.exp()[..., None]
        outs.append(weight if u is None else out[..., :width] * weight)
    joined = torch.stack(outs, 2).flatten(1, 2)
    return joined.flip(2) if causal else joined


def _attend_T_blockwise(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    u: Tensor | None,
    rule: Mask | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The plain form: weights of some rows at a time."""
    u = q.new_ones(q.shape[0], 1, q.shape[2], 1) if u is None else u
    out = q.new_zeros(*q.shape[:2], k.shape[2], u.shape[3])
    for rows in _steps(q, k):
        base = lse[:, :, rows, None]
        s = _logits(q, k, rows, rule, scale, softcap)
        p = torch.exp(s - base.masked_fill(torch.isinf(base), float("inf")))
        out += p.transpose(-1, -2) @ u[:, :, rows]
    return out
