"""Selectors: from scores to a bool map of what is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.shapes import check_block


def _visible(scores: Tensor, visible: Tensor | None) -> Tensor:
    if visible is None:
        return torch.ones_like(scores, dtype=torch.bool)
    return visible.expand_as(scores)


def top_k(scores: Tensor, k: int | Tensor, *, visible: Tensor | None = None) -> Tensor:
    """Keep the k best of each row: scores (…, n) -> bool (…, n), ties to the lower index.

    k may be a tensor that broadcasts to the rows (…); `visible` rules entries out.
    """
    if not isinstance(k, Tensor):
        check_block("k", k)
    seen = _visible(scores, visible)
    order = scores.masked_fill(~seen, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    slots = torch.arange(scores.shape[-1], device=scores.device)
    limit = k[..., None] if isinstance(k, Tensor) else k
    kept = (slots < limit).expand_as(order)
    return torch.zeros_like(seen).scatter_(-1, order, kept) & seen


def top_p(
    probs: Tensor,
    p: float | Tensor,
    *,
    crossing: str = "include",
    scope: str = "row",
    visible: Tensor | None = None,
) -> Tensor:
    """Keep the largest entries until their share of the mass reaches p; probs (…, nQ, nK) -> bool.

    The entry that crosses p is kept with crossing "include", dropped with "exclude" (at least one
    entry always stays). scope "row" decides per row, "head" over all rows of a head at once.
    p >= 1 keeps everything visible; a tensor p broadcasts to the rows (…, nQ), in scope "head" to
    the heads (…).
    """
    if crossing not in ("include", "exclude") or scope not in ("row", "head"):
        raise ValueError(
            f"crossing must be include or exclude, scope row or head; got {crossing!r}, {scope!r}"
        )
    share = torch.as_tensor(p, dtype=probs.dtype, device=probs.device)[..., None]
    if bool((share <= 0).any()):
        raise ValueError(f"p must be above 0, got {p}")
    seen = _visible(probs, visible)
    if bool((share >= 1).all()):
        return seen.clone()
    mass = probs.masked_fill(~seen, -1.0)
    if scope == "head":
        mass = mass.flatten(-2)
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    ranked = ranked.clamp_min(0.0)
    total = ranked.sum(-1, keepdim=True)
    after = ranked.cumsum(-1)
    least = share * total
    kept = (after - ranked < least) if crossing == "include" else (after <= least)
    kept &= ranked > 0
    kept[..., 0] = True
    kept |= share >= 1
    out = torch.zeros_like(kept).scatter_(-1, order, kept)
    return out.view_as(probs) & seen


def threshold(scores: Tensor, t: float, *, visible: Tensor | None = None) -> Tensor:
    """Keep entries of at least t: scores (…, n) -> bool (…, n)."""
    return (scores >= t) & _visible(scores, visible)


def force(
    chosen: Tensor,
    visible: Tensor,
    *,
    first: int = 0,
    local: int = 0,
    last_rows: int = 0,
) -> Tensor:
    """Add blocks that must be kept: chosen (…, nQ, nK) and visible (nQ, nK) -> bool (…, nQ, nK).

    The `first` key blocks, the last `local` visible blocks of every row (1 = the diagonal when
    grids agree), and everything for the last `last_rows` query blocks; never what is not visible.
    """
    cols = torch.arange(visible.shape[-1], device=visible.device)
    rows = torch.arange(visible.shape[-2], device=visible.device)
    newest = torch.where(visible, cols, -1).amax(-1, keepdim=True)
    must = (cols < first) | (cols > newest - local)
    must = must | (rows >= visible.shape[-2] - last_rows)[:, None]
    return (chosen | must) & visible
