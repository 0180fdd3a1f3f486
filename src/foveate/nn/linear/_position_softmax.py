"""Linear attention whose keys are a softmax over positions, channel by channel."""

from __future__ import annotations

import math

from torch import Tensor

from foveate import ops


def softmax_before(
    logits: Tensor, z: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and log-decays of a recurrence whose state holds softmax averages of every prefix.

    logits (B, H, T, K), z (B, H, K) their log-sum-exp before, real tokens valid (B, T) -> keys and
    decays like logits, and z after; all of them float32.
    """
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, :, None], -math.inf)
    return ops.prefix_softmax_gate(logits, z)


def softmax_everywhere(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax over all real tokens valid (B, T) of logits (B, H, T, K), 0 elsewhere."""
    if valid is None:
        return logits.softmax(2)
    unreal = ~valid[:, None, :, None]
    return logits.masked_fill(unreal, -math.inf).softmax(2).masked_fill(unreal, 0.0)
