"""A layer whose heads attend under a mechanism of kind "attention"."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.base import Attention, Call, phase_of
from foveate.nn._attention import AttentionLayer
from foveate.ops import Mask


class Attending(AttentionLayer):
    """An attention mechanism as layer `index` of `layers`."""

    def __init__(
        self,
        mechanism: Attention,
        dim: int,
        heads: int,
        *,
        index: int = 0,
        layers: int = 1,
        theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, heads, heads, theta=theta, device=device, dtype=dtype)
        self.mechanism, self.place = mechanism, (index, layers)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask | None) -> Tensor:
        """What the mechanism gives."""
        phase = phase_of(q.shape[2], k.shape[2])
        call = Call(layer=self.place[0], layers=self.place[1], phase=phase)
        return self.mechanism(q, k, v, causal=causal, mask=mask, call=call)
