"""Exact softmax attention of every query over its own list of tokens or small blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.native import decode
from foveate.ops.backend import native_for
from foveate.ops.shapes import Shape, check_block, check_qkv
from foveate.ops.tile import attend_tile, default_scale, recomputed

# Elements of gathered keys per step; queries of one list from which on a matrix product is faster.
_CHUNK, _MANY = 1 << 20, 128


def gather_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    valid: Tensor | None,
    *,
    width: int,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor] | None:
    """`gather` by the CPU kernel, or None where it cannot serve the call."""
    found = native_for(q, k, v)
    if found is None or not idx.numel() or (idx.shape[2] == 1 and q.shape[2] >= _MANY):
        return None
    factor = default_scale(scale, q.shape[3])
    return decode.gather(found, q, k, v, idx, valid, width=width, scale=factor, softcap=softcap)


def gather_torch(
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
    """PyTorch form of `gather`: a loop over blocks of queries with bounded memory."""
    shape = check_qkv(q, k, v)
    lanes = shape.q_heads if idx.shape[1] == shape.q_heads else shape.kv_heads
    full = (shape.batch, lanes, *idx.shape[2:])
    idx = idx.long().expand(full)
    seen = None if valid is None else valid.expand(full)
    scale = default_scale(scale, shape.dim)
    wide = idx.shape[3] * width * lanes * shape.batch * max(shape.dim, shape.v_dim)
    step = shape.q_len if idx.shape[2] == 1 else max(1, _CHUNK // max(1, wide))
    outs, lses = [], []
    for lo in range(0, shape.q_len, step):
        rows = slice(lo, min(lo + step, shape.q_len))
        part = slice(None) if idx.shape[2] == 1 else rows
        lists = idx[:, :, part]
        tokens, real = _tokens(lists, None if seen is None else seen[:, :, part], width, shape)
        added = _added(bias, tokens, real, rows, shape)
        out, lse = recomputed(_step, q[:, :, rows], k, v, tokens, added, scale, softcap)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def check_indices(idx: Tensor, valid: Tensor | None, shape: Shape, width: int) -> None:
    """Refuse lists that do not fit the call or point outside the keys."""
    check_block("width", width)
    if idx.dim() != 4 or idx.is_floating_point() or idx.dtype == torch.bool:
        raise ValueError(
            f"idx must be an integer tensor (batch, heads, queries, m), got {idx.dtype} "
            f"{tuple(idx.shape)}"
        )
    heads = (1, shape.kv_heads, shape.q_heads)
    if idx.shape[0] not in (1, shape.batch) or idx.shape[1] not in heads:
        raise ValueError(
            f"idx has (batch, heads) {tuple(idx.shape[:2])}; wanted batch 1 or {shape.batch} and "
            f"heads 1, {shape.kv_heads} or {shape.q_heads}"
        )
    if idx.shape[2] not in (1, shape.q_len):
        raise ValueError(f"idx has {idx.shape[2]} lists; wanted 1 or {shape.q_len} (one a query)")
    if valid is not None and (valid.shape != idx.shape or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be a bool tensor {tuple(idx.shape)}, got {valid.dtype} "
            f"{tuple(valid.shape)}"
        )
    blocks = -(-shape.k_len // width)
    if idx.numel() and not 0 <= int(idx.min()) <= int(idx.max()) < blocks:
        raise ValueError(f"idx must lie in [0, {blocks}), got [{int(idx.min())}, {int(idx.max())}]")


def _tokens(
    lists: Tensor, seen: Tensor | None, width: int, shape: Shape
) -> tuple[Tensor, Tensor | None]:
    """Token indices (B, lanes, R, m * width) of a slice of lists, and which of them are real."""
    if width > 1:
        tokens = (lists[..., None] * width + torch.arange(width, device=lists.device)).flatten(3)
        inside = tokens < shape.k_len
        if seen is not None:
            inside = inside & seen.repeat_interleave(width, -1)
        return tokens.clamp_max(shape.k_len - 1), None if bool(inside.all()) else inside
    return lists, None if seen is None or bool(seen.all()) else seen


def _added(
    bias: Tensor | None, tokens: Tensor, real: Tensor | None, rows: slice, shape: Shape
) -> Tensor | None:
    """Additive bias (B, Hq|lanes, R, m) of the gathered tokens."""
    added = None
    if real is not None:
        zero = torch.zeros((), dtype=torch.float32, device=tokens.device)
        added = torch.where(real, zero, float("-inf"))
    if bias is None:
        return added
    span = rows if bias.shape[2] > 1 else slice(None)
    heads = tokens.repeat_interleave(shape.q_heads // tokens.shape[1], 1)
    values = bias[:, :, span].expand(shape.batch, shape.q_heads, -1, shape.k_len)
    count = max(values.shape[2], heads.shape[2])
    heads = heads.expand(-1, -1, count, -1)
    picked = values.expand(-1, -1, count, -1).gather(-1, heads)
    if added is None:
        return picked
    return picked + added.repeat_interleave(shape.q_heads // added.shape[1], 1)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    added: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of R queries: one tile per list, holding the queries and heads that share it."""
    b, hq, r, _ = q.shape
    _, lanes, lists, m = tokens.shape
    fold = hq // lanes
    kv = torch.arange(lanes, device=q.device) // (lanes // k.shape[1])
    base = torch.arange(b, device=q.device)[:, None] * k.shape[1] + kv
    flat = (base[..., None, None] * k.shape[2] + tokens).flatten()
    n = b * lanes * lists
    keys = k.reshape(-1, k.shape[3]).index_select(0, flat).view(n, 1, m, k.shape[3])
    values = v.reshape(-1, v.shape[3]).index_select(0, flat).view(n, 1, m, v.shape[3])
    share = r // lists  # queries that read one list: 1, or all of them
    tiles = (
        q.reshape(b, lanes, fold, lists, share, -1)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(n, fold, share, q.shape[3])
    )
    if added is not None:
        added = added.expand(-1, -1, r, -1)
        heads = added.shape[1] // lanes
        added = added.reshape(b, lanes, heads, lists, share, m).permute(0, 1, 3, 2, 4, 5)
        added = added.reshape(n, heads, share, m)
    out, lse = attend_tile(tiles, keys, values, added, scale, softcap)
    out = out.view(b, lanes, lists, fold, share, -1).permute(0, 1, 3, 2, 4, 5)
    lse = lse.view(b, lanes, lists, fold, share).permute(0, 1, 3, 2, 4)
    return out.reshape(b, hq, r, -1), lse.reshape(b, hq, r)
