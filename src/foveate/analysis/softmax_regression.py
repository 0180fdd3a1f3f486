"""Closeness of in-context learning and weight shifting for softmax regression (2023, paper 40)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from foveate.analysis.base import Record
from foveate.registry import Card, register

# The largest spectral norm of the Jacobian of a softmax.
_SOFTMAX = 0.5


class Regression(Protocol):
    """Softmax regressions: a (n, L, d), the x (n, d) sought and the gradient of the loss."""

    @property
    def a(self) -> Tensor:
        """The examples."""

    @property
    def x(self) -> Tensor:
        """What they were made with."""

    def gradient(self, x: Tensor) -> Tensor:
        """Of ½‖softmax(a x) - b‖² by x, (n, d)."""


class Change(NamedTuple):
    """How far softmax(a x) moved, (n,), and how far it can have moved at most, (n,)."""

    moved: Tensor
    bound: Tensor


@register(
    Card(
        name="softmax_regression",
        title="The Closeness of In-Context Learning and Weight Shifting for Softmax Regression",
        year=2023,
        paper=40,
        claim="a gradient step of softmax regression moves its output as little, within one bound, "
        "as a shift of what attention is given",
        kind="analysis",
        family="analysis",
        patterns=("noncausal cross",),
        pretrained="scratch",
        cost="a singular value of every a",
        confidence="medium",
    )
)
@dataclass(frozen=True, kw_only=True)
class SoftmaxRegression:
    """A gradient step of x, and the shift of a that attention would need for the same output.

    By regression: `step` (‖change of x‖), `shift` (largest singular value of the change of a),
    `moved` and `moved_by_shift` (‖change of softmax(a x)‖ by either) and `step_bound` and
    `shift_bound`, above which it cannot be. The step is `rate` · L times the gradient.
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")

    @torch.no_grad()
    def __call__(self, data: Regression, x: Tensor) -> Record:
        """At x (n, d), which must not be 0; ValueError for another shape."""
        if x.shape != data.x.shape:
            raise ValueError(f"x must be {tuple(data.x.shape)}, got {tuple(x.shape)}")
        step = -self.rate * data.a.shape[1] * data.gradient(x)
        shift = equal_shift(data.a, x, step)
        by_step, by_shift = change_of_x(data.a, x, step), change_of_a(data.a, x, shift)
        values = {
            "step": step.norm(dim=-1),
            "shift": torch.linalg.matrix_norm(shift, 2),
            "moved": by_step.moved,
            "moved_by_shift": by_shift.moved,
            "step_bound": by_step.bound,
            "shift_bound": by_shift.bound,
        }
        return Record("softmax_regression", values, dict.fromkeys(values, ("regression",)))


def change_of_x(a: Tensor, x: Tensor, step: Tensor) -> Change:
    """Of x -> x + step (n, d), at most ½ ‖a‖ ‖step‖ with the spectral norm of a."""
    moved = (_outputs(a, x + step) - _outputs(a, x)).norm(dim=-1)
    return Change(moved, _SOFTMAX * torch.linalg.matrix_norm(a, 2) * step.norm(dim=-1))


def change_of_a(a: Tensor, x: Tensor, shift: Tensor) -> Change:
    """Of a -> a + shift (n, L, d), at most ½ ‖shift‖ ‖x‖ with the spectral norm of the shift."""
    moved = (_outputs(a + shift, x) - _outputs(a, x)).norm(dim=-1)
    return Change(moved, _SOFTMAX * torch.linalg.matrix_norm(shift, 2) * x.norm(dim=-1))


def equal_shift(a: Tensor, x: Tensor, step: Tensor) -> Tensor:
    """A shift (n, L, d) of a, of rank 1, with (a + shift) x = a (x + step)."""
    return (a @ step[..., None]) * (x / x.square().sum(-1, keepdim=True))[:, None]


def _outputs(a: Tensor, x: Tensor) -> Tensor:
    """softmax(a x), (n, L)."""
    return torch.einsum("nld,nd->nl", a, x).softmax(-1)
