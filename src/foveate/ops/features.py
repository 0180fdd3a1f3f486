"""Feature maps of linear attention: φ with weights φ(q)·φ(k)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import elu, relu, silu


class FeatureMap(NamedTuple):
    """A map x (…, K) -> φ(x) (…, width(K)).

    positive: no weight φ(q)·φ(k) is negative, so that weights may be divided by their sum;
    scaled: the scale 1/sqrt(K) of q·k is in it.
    """

    apply: Callable[[Tensor], Tensor]
    width: Callable[[int], int]
    positive: bool
    scaled: bool

    def __call__(self, x: Tensor) -> Tensor:
        """φ(x)."""
        return self.apply(x)


def taylor2(x: Tensor) -> Tensor:
    """φ with φ(q)·φ(k) = 1 + s + s²/2, s = q·k/sqrt(K), of the K(K+1)/2 distinct products."""
    width = x.shape[-1]
    row, column = torch.triu_indices(width, width, device=x.device)
    # s² has every product of two different channels twice.
    weight = torch.where(row == column, 0.5, 1.0).to(x.dtype).sqrt()
    x = x * width**-0.25
    return torch.cat((torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * weight), -1)


def taylor1(x: Tensor) -> Tensor:
    """φ with φ(q)·φ(k) = 1 + q·k/sqrt(K)."""
    return torch.cat((torch.ones_like(x[..., :1]), x * x.shape[-1] ** -0.25), -1)


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1."""
    return elu(x) + 1


def _identity(x: Tensor) -> Tensor:
    return x


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _same(width: int) -> int:
    return width


def _linear(width: int) -> int:
    return 1 + width


def _quadratic(width: int) -> int:
    return 1 + width + width * (width + 1) // 2


FEATURES = {
    "identity": FeatureMap(_identity, _same, False, False),
    "elu1": FeatureMap(elu1, _same, True, False),
    "relu": FeatureMap(relu, _same, True, False),
    "silu": FeatureMap(silu, _same, False, False),
    "sigmoid": FeatureMap(torch.sigmoid, _same, True, False),
    "exp": FeatureMap(torch.exp, _same, True, False),
    "softmax": FeatureMap(_softmax, _same, True, False),
    "taylor1": FeatureMap(taylor1, _linear, False, True),
    "taylor2": FeatureMap(taylor2, _quadratic, True, True),
}


def feature_map(name: str) -> FeatureMap:
    """A feature map by name; ValueError for an unknown one."""
    if name not in FEATURES:
        raise ValueError(f"unknown feature map {name!r}; known: {', '.join(FEATURES)}")
    return FEATURES[name]
