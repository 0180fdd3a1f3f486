"""Perturbations of attention logits that change a loss most, within a norm of each example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NORMS = ("example", "position")


def steepest(gradient: Tensor, epsilon: float, norm: str) -> Tensor:
    """The step (B, …) of size epsilon along a gradient (B, …); 0 where that is 0.

    Of the 2-norm epsilon in every example (norm "example"), or epsilon in every entry
    ("position").
    """
    if norm == "position":
        return epsilon * gradient.sign()
    flat = gradient.flatten(1)
    length = flat.norm(dim=1, keepdim=True)
    unit = torch.where(length > 0, flat / length.masked_fill(length == 0, 1.0), 0.0)
    return epsilon * unit.view_as(gradient)


def slope(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Gradient of a value (B,) of logits (B, …), 0 at those of -inf; no parameter gets any."""
    leaf = at.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
    return gradient.masked_fill(~at.isfinite(), 0.0)


def check_options(norm: str, **sizes: float) -> None:
    """Refuse an unknown norm, and by name a negative size."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name} must be at least 0, got {size}")
