"""Models whose attention is what a test says it is."""

import torch
from torch import Tensor

from foveate.hf.masks import LayerMask
from foveate.hf.watch import Seen


def attending(p: Tensor, causal: bool = True) -> Seen:
    """A layer's attention with given weights (B, H, L, L), zero where nothing may be seen."""
    length = p.shape[-1]
    size = -(-(length + 1) // 8) * 8
    logits = p.clamp_min(1e-30).log()
    q = torch.zeros(*p.shape[:3], size)
    q[..., :length] = logits
    k = torch.zeros_like(q)
    k[..., range(length), range(length)] = 1.0
    return Seen(0, q, k, torch.randn_like(k), LayerMask(causal, None, None), 1.0, None)


def banded(length: int, offset: int) -> Tensor:
    """Every token looks `offset` tokens back, the first ones at the first."""
    p = torch.zeros(1, 1, length, length)
    at = (torch.arange(length) - offset).clamp_min(0)
    p[0, 0, torch.arange(length), at] = 1.0
    return p


def uniform(length: int) -> Tensor:
    """Every token looks at all it sees alike."""
    p = torch.ones(length, length).tril()
    return (p / p.sum(-1, keepdim=True))[None, None]
