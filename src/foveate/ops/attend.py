"""Dense attention, streamed: never an Lq×Lk tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.mask import Mask, with_causal
from foveate.ops.merge import merge
from foveate.ops.normalizers import Normalizer, Softmax, Stats
from foveate.ops.shapes import check_qkv, positions, tile_positions
from foveate.ops.tile import (
    attend_tile,
    cap,
    default_scale,
    flash,
    grouped_logits,
    grouped_values,
    has_flash,
    recomputed,
)

# Query rows of one step, keys of one step of a streamed normaliser, and the keys that a mask's
# bounds are asked about at once.
_ROWS, _KEYS, _TILE = 256, 2048, 128


def attend_torch(
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
    """PyTorch form of `attend`; arguments are those of the public function, already resolved."""
    shape = check_qkv(q, k, v)
    factor = default_scale(scale, shape.dim)
    soft = isinstance(normalizer, Softmax)
    plain = mask is None and bias is None and softcap is None and q_pos is None and k_pos is None
    if soft and plain:
        if has_flash(q, v, softcap, k):
            return _flash_dense(q, k, v, is_causal, factor)
        square = shape.q_len == shape.k_len
        fits = shape.dim == shape.v_dim and factor >= 0 and (square or not is_causal)
        if fits and not return_lse:
            sdpa = torch.nn.functional.scaled_dot_product_attention
            out = sdpa(q, k, v, is_causal=is_causal, scale=factor, enable_gqa=shape.group > 1)
            return out, None
    rule, positions = with_causal(mask, is_causal), positions_of(q, k, q_pos, k_pos)
    if soft and rule is None and shape.q_len <= _ROWS and has_flash(q, v, softcap, k, bias):
        return attend_tile(q, k, v, bias, factor)
    walk = _Walk(q, k, v, rule, bias, factor, softcap, *positions)
    if soft and has_flash(q, v, softcap, k, bias):
        return walk.softmax()
    out, stats = walk.stream(normalizer)
    return out, normalizer.lse(stats) if return_lse else None


def positions_of(
    q: Tensor, k: Tensor, q_pos: Tensor | None, k_pos: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Positions of the rows of q and k."""
    return positions(q.shape[2], k.shape[2], q_pos, k_pos, q.device)


def _flash_dense(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Unmasked attention by PyTorch's kernel, whose causal form needs Lq = Lk."""
    past = k.shape[2] - q.shape[2]
    if not is_causal or q.shape[2] == 1 or past == 0:
        return flash(q, k, v, scale, causal=is_causal and past == 0)
    before = flash(q, k[:, :, :past], v[:, :, :past], scale)
    own = flash(q, k[:, :, past:], v[:, :, past:], scale, causal=True)
    return merge([before, own])


class _Walk:
    """A walk over blocks of query rows; each block reads only the span of keys it may see."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rule: Mask | None,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        q_pos: Tensor,
        k_pos: Tensor,
    ) -> None:
        self.q, self.k, self.v, self.rule, self.bias = q, k, v, rule, bias
        self.scale, self.softcap, self.q_pos, self.k_pos = scale, softcap, q_pos, k_pos
        tiles = tile_positions(k_pos, 0, _TILE, -(-k.shape[2] // _TILE))[:, None, None]
        self.k_edges = tiles.amin(-1), tiles.amax(-1)

    def spans(self) -> list[tuple[slice, slice]]:
        """Blocks of rows and, for each, the slice of keys outside of which nothing is visible."""
        lq, lk = self.q.shape[2], self.k.shape[2]
        out = []
        for lo in range(0, max(lq, 1), _ROWS):
            rows = slice(lo, min(lo + _ROWS, lq))
            span = slice(0, lk)
            if self.rule is not None and lq > 0:
                span = self._span(self.rule, rows)
            out.append((rows, span))
        return out

    def _span(self, rule: Mask, rows: slice) -> slice:
        b, h = rule.axes(self.q.device)
        qp = self.q_pos[:, rows]
        q_lo, q_hi = (x.view(-1, 1, 1, 1) for x in (qp.amin(-1), qp.amax(-1)))
        some, _ = rule.bounds(b, h, q_lo, q_hi, *self.k_edges)
        tiles = self.k_edges[0].shape[-1]
        seen = some.expand(*some.shape[:-1], tiles).flatten(0, -2).any(0).nonzero()
        if seen.numel() == 0:
            return slice(0, 0)
        return slice(int(seen[0]) * _TILE, min(int(seen[-1] + 1) * _TILE, self.k_pos.shape[1]))

    def visible(self, rows: slice, keys: slice) -> Tensor | None:
        """Bool tensor (B|1, H|1, rows, keys), None where everything is visible."""
        if self.rule is None:
            return None
        b, h = self.rule.axes(self.q.device)
        qp, kp = self.q_pos[:, None, rows, None], self.k_pos[:, None, None, keys]
        return self.rule(b, h, qp, kp)

    def added(self, rows: slice, keys: slice, seen: Tensor | None) -> Tensor | None:
        """Additive bias of the tile with -inf where nothing is visible."""
        bias = self.bias
        if bias is not None:
            bias = bias[:, :, rows if bias.shape[2] > 1 else slice(None)]
            bias = bias[..., keys if bias.shape[3] > 1 else slice(None)]
        if seen is None:
            return bias
        zero = torch.zeros((), dtype=torch.float32, device=seen.device) if bias is None else bias
        return torch.where(seen, zero, float("-inf"))

    def softmax(self) -> tuple[Tensor, Tensor]:
        """Softmax attention, one block of rows at a time."""
        outs, lses = [], []
        for rows, keys in self.spans():
            tile = self.q[:, :, rows], self.k[:, :, keys], self.v[:, :, keys]
            added = self.added(rows, keys, self.visible(rows, keys))
            if added is not None:
                added = added.expand(-1, -1, tile[0].shape[2], tile[1].shape[2])
            out, lse = attend_tile(*tile, added, self.scale, self.softcap)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def stream(self, normalizer: Normalizer) -> tuple[Tensor, Stats]:
        """Attention under any normaliser, blocks of rows times blocks of keys."""
        outs, parts = [], []
        for rows, keys in self.spans():
            args = (normalizer, rows, keys, self.q, self.k, self.v, self.bias)
            out, stats = recomputed(self._rows, *args)
            outs.append(out)
            parts.append(stats)
        joined = {name: torch.cat([p[name] for p in parts], 2) for name in parts[0]}
        return torch.cat(outs, 2).to(self.q.dtype), joined

    def _rows(
        self, normalizer: Normalizer, rows: slice, keys: slice, *_: Tensor | None
    ) -> tuple[Tensor, Stats]:
        q = self.q[:, :, rows]
        wide = torch.promote_types(q.dtype, torch.float32)
        stats = normalizer.init(torch.zeros(*q.shape[:3], 1, dtype=wide, device=q.device))
        acc = torch.zeros(*q.shape[:3], self.v.shape[3], dtype=wide, device=q.device)
        steps = [
            slice(lo, min(lo + _KEYS, keys.stop)) for lo in range(keys.start, keys.stop, _KEYS)
        ]
        if normalizer.passes == 2:
            for step in steps:
                stats, _shrink = normalizer.update(stats, *self._scores(q, rows, step))
        for step in steps:
            scores, seen = self._scores(q, rows, step)
            if normalizer.passes == 1:
                stats, shrink = normalizer.update(stats, scores, seen)
                acc = acc if shrink is None else acc * shrink
            weights = torch.where(seen, normalizer.weight(scores, stats), 0.0)
            acc = acc + grouped_values(weights, self.v[:, :, step])
        return normalizer.finish(acc, stats), stats

    def _scores(self, q: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        scores = cap(grouped_logits(q, self.k[:, :, keys], self.scale), self.softcap)
        seen = self.visible(rows, keys)
        added = self.added(rows, keys, seen)
        if added is not None:
            scores = scores + added
        seen = torch.ones_like(scores, dtype=torch.bool) if seen is None else seen
        return scores, seen.expand_as(scores)
