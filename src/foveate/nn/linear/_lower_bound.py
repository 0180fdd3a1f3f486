"""Forget gates whose lower bounds rise from layer to layer, as the HGRN layers have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from foveate.nn._recurrent import Recurrent


class LowerBound(nn.Module):
    """Logarithms of forget gates f = b + (1 - b) σ(x), b the lower bound of layer `index`.

    The shares of a softmax over `layers` numbers of every channel add up from the second layer on:
    b is 0 in the first layer, rises with depth and stays below 1. Layers of a model share them.
    """

    def __init__(self, width: int, index: int, layers: int, **made: Any) -> None:
        super().__init__()
        if not 0 <= index < layers:
            raise ValueError(f"index must be in [0, layers), got {index} of {layers} layers")
        self.index = index
        # Nothing of them reaches the gates of the first layer.
        self.logits = nn.Parameter(torch.zeros(layers, width, **made)) if index else None

    def forward(self, x: Tensor) -> Tensor:
        """log f (…, width) in float32 of x (…, width)."""
        gate = logsigmoid(x.float())
        if self.logits is None:
            return gate
        shares = self.logits.float().log_softmax(0)
        first, bound, rest = shares.split((1, self.index, len(shares) - 1 - self.index))
        free = torch.cat((first, rest)).logsumexp(0)  # log(1 - b) without a difference
        return torch.logaddexp(bound.logsumexp(0), free + gate)


class Bounded(Recurrent):
    """A layer whose forget gates come from `bound`; all of a model share the numbers in it."""

    bound: LowerBound

    @classmethod
    def tie(cls, layers: Sequence[Bounded]) -> None:
        """Let layers share the numbers of their bounds; ValueError when their sizes differ."""
        shared: nn.Parameter | None = None
        for layer in layers:
            own = layer.bound.logits
            if own is None:
                continue
            shared = own if shared is None else shared
            if own.shape != shared.shape:
                raise ValueError(
                    f"layers that share lower bounds must be alike, "
                    f"got {tuple(shared.shape)} and {tuple(own.shape)}"
                )
            layer.bound.logits = shared
