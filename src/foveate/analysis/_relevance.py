"""Layer-wise relevance propagation through stacks of convolutions, pools and linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_PASSING = (nn.ReLU, nn.Dropout, nn.Identity)


def relevance(
    layers: Sequence[nn.Module], image: Tensor, target: Tensor, *, eps: float, alpha: float | None
) -> Tensor:
    """Relevance (B, C, H, W) of pixels for the logits of classes target (B,).

    The epsilon rule shares a unit's relevance by a w / (Σ a w + eps sign); with alpha, positive
    and negative contributions are shared apart, alpha of the former and 1 - alpha of the latter.
    Pools pass relevance to what they took. Raises TypeError for another kind of layer.
    """
    inputs = [image]
    with torch.no_grad():
        for layer in layers:
            inputs.append(layer(inputs[-1]))
    logits = inputs.pop()
    held = torch.zeros_like(logits).scatter(1, target[:, None], logits.gather(1, target[:, None]))
    for layer, x in zip(reversed(layers), reversed(inputs), strict=True):
        if isinstance(layer, (*_PASSING, nn.Flatten)):
            held = held.view_as(x)
        elif isinstance(layer, _POOLS):
            held = _shared(layer, x, held, eps)
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            held = _weighted(layer, x, held, eps, alpha)
        else:
            raise TypeError(f"no rule of relevance for {type(layer).__name__}")
    return held


def _weighted(layer: Any, x: Tensor, held: Tensor, eps: float, alpha: float | None) -> Tensor:
    """Through a layer of weights; its bias keeps what it contributed."""
    if alpha is None:
        return _shared(layer, x, held, eps)
    positive, negative = layer.weight.clamp_min(0), layer.weight.clamp_max(0)

    def contributions(signs: tuple[Tensor, Tensor], low: float, high: float) -> Callable[..., Any]:
        bias = None if layer.bias is None else layer.bias.clamp(low, high)

        def made(x: Tensor) -> Any:
            return _applied(layer, x.clamp_min(0), signs[0], bias) + _applied(
                layer, x.clamp_max(0), signs[1], None
            )

        return made

    up = contributions((positive, negative), 0.0, float("inf"))
    down = contributions((negative, positive), float("-inf"), 0.0)
    return _shared(up, x, alpha * held, eps) + _shared(down, x, (1 - alpha) * held, eps)


def _applied(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a layer gives with other weights."""
    if isinstance(layer, nn.Linear):
        return linear(x, weight, bias)
    return conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _shared(forward: Callable[..., Any], x: Tensor, held: Tensor, eps: float) -> Tensor:
    """Relevance of inputs by their share in sums z = forward(x): x · ∂(z · held / z) / ∂x."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        z = forward(leaf)
    signed = z.detach() + eps * torch.where(z.detach() < 0, -1.0, 1.0)
    ratio = torch.where(signed == 0, 0.0, held / signed.masked_fill(signed == 0, 1.0))
    (gradient,) = torch.autograd.grad(z, leaf, ratio)
    return leaf.detach() * gradient
