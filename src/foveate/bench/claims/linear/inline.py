"""InLine attention (2024, paper 252): whether two queries can have the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.bench.claims import Outcome
from foveate.nn.linear.inline import inline_attention

CLAIM = "normalised by subtraction, linear attention tells a query from its double, by division not"

_TOKENS, _WIDTH = 196, 16


@torch.inference_mode()
def measure() -> Outcome:
    """196 random queries and keys of 16 channels in 8 heads, features relu.

    How far the weights of a query are from those of its double, relative to their size, the mean
    over queries.
    """
    made = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, 1, _TOKENS, _WIDTH, generator=made)
    figures = {
        "distance, InLine": _apart(_inline, q, k),
        "distance, divided": _apart(_divided, q, k),
        "distance, softmax": _apart(_softmax, q, k),
    }
    mine, divided, soft = figures.values()
    return Outcome(figures, divided < 1e-4 < 0.01 < min(mine, soft))


def _apart(weights: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> float:
    once, twice = weights(q, k), weights(2 * q, k)
    return float(((once - twice).norm(dim=-1) / once.norm(dim=-1)).mean())


def _inline(q: Tensor, k: Tensor) -> Tensor:
    """Weights (…, n, n), read off as the outputs of values that are one-hot."""
    each = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
    return inline_attention(q.relu(), k.relu(), each)


def _divided(q: Tensor, k: Tensor) -> Tensor:
    weights = q.relu() @ k.relu().mT
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)


def _softmax(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * _WIDTH**-0.5).softmax(-1)
