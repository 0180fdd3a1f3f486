"""Mixing the slots of a cache: fewer slots, each a weighted mean of those assigned to it."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(x: Tensor, slot: Tensor, weight: Tensor, slots: int) -> Tensor:
    """Weighted means x' = W x of what is assigned to each slot: (H, n, D) -> (H, slots, D).

    slot (H, n) int in [0, slots) says where an entry goes, weight (H, n) >= 0 how much it counts
    there. The rows of W sum to 1; a slot without weight gives 0. Sums are in float32.
    """
    if slot.shape != x.shape[:2] or weight.shape != slot.shape:
        raise ValueError(
            f"slot and weight must be {tuple(x.shape[:2])} as x, got {tuple(slot.shape)} and "
            f"{tuple(weight.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(wide)
    total = weight.new_zeros(x.shape[0], slots).scatter_add(1, slot, weight)
    parts = x.to(wide) * weight[..., None]
    sums = parts.new_zeros(x.shape[0], slots, x.shape[2])
    sums = sums.scatter_add(1, slot[..., None].expand_as(parts), parts)
    means = sums / total.masked_fill(total == 0, 1)[..., None]
    return means.to(x.dtype)
