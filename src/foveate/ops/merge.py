"""Combining partial attentions over disjoint keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge(
    parts: Sequence[tuple[Tensor, Tensor]], gamma: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Combine partial attentions [(out, lse), …] into one (out, lse).

    out (…, Dv), lse (…) float32. Part p weighs exp(gamma[p] * lse[p]), gamma > 0 and 1 by default,
    which is exact. Parts that saw no key (lse -inf) weigh nothing; a row no part saw gives 0, -inf.
    """
    if not parts:
        raise ValueError("merge needs at least one part, got none")
    powers = [1.0] * len(parts) if gamma is None else list(gamma)
    if len(powers) != len(parts) or any(g <= 0 for g in powers):
        raise ValueError(f"gamma must hold {len(parts)} positive numbers, got {gamma}")
    logs = torch.stack([g * lse for g, (_, lse) in zip(powers, parts, strict=True)])
    top = logs.detach().amax(0)
    top = top.masked_fill(torch.isinf(top), 0)
    weights = torch.exp(logs - top)
    total = weights.sum(0)
    seen = total > 0
    share = weights / total.masked_fill(~seen, 1)
    out = torch.stack([w[..., None] * o for w, (o, _) in zip(share, parts, strict=True)]).sum(0)
    lse = (top + total.masked_fill(~seen, 1).log()).masked_fill(~seen, -math.inf)
    return out.to(parts[0][0].dtype), lse
