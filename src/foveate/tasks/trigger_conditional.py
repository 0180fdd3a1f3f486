"""The mean of what stands before a trigger, else nothing.

"Attention Sinks Are Provably Necessary in Softmax Transformers" (2026, paper 188).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from foveate.tasks.batch import check_at_least

TRIGGER, START, PLAIN, CONTENT = 0, 1, 2, 3  # coordinates of the marks, first one of the content


class Triggered(NamedTuple):
    """Rows of vectors: inputs and targets (n, L, dim), and where each trigger stands (n,)."""

    inputs: Tensor
    targets: Tensor
    trigger: Tensor

    def loss(self, outputs: Tensor) -> Tensor:
        """Mean squared error of outputs (n, L, dim)."""
        return mse_loss(outputs, self.targets)


def trigger_conditional(rows: int, *, seed: int, length: int = 24, dim: int = 16) -> Triggered:
    """At the trigger the mean content of the tokens between it and the start, elsewhere 0.

    Coordinate 0 marks the trigger, 1 the start (position 0, without content), 2 the tokens that are
    neither; the others are content, standard normal. A row has one trigger, equally likely at 2 to
    length - 1; the marks of the target are 0.
    """
    check_at_least(1, rows=rows)
    check_at_least(3, length=length)
    check_at_least(4, dim=dim)
    made = torch.Generator().manual_seed(seed)
    trigger = torch.randint(2, length, (rows,), generator=made)
    at = torch.arange(length)
    is_trigger = at == trigger[:, None]
    inputs = torch.randn(rows, length, dim, generator=made)
    inputs[:, 0, CONTENT:] = 0
    inputs[..., TRIGGER] = is_trigger.float()
    inputs[..., START] = (at == 0).float()
    inputs[..., PLAIN] = ((at > 0) & ~is_trigger).float()
    before = ((at > 0) & (at < trigger[:, None])).float()
    targets = torch.zeros_like(inputs)
    mean = torch.einsum("nl,nld->nd", before, inputs[..., CONTENT:]) / before.sum(1, keepdim=True)
    targets[torch.arange(rows), trigger, CONTENT:] = mean
    return Triggered(inputs, targets, trigger)
