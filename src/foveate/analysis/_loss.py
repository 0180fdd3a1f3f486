"""Loss of a model on texts, for what an edit costs."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from foveate.hf.parts import Inputs, head_logits, real_tokens, run


@torch.no_grad()
def next_token_loss(model: Any, inputs: Inputs) -> float:
    """Mean loss, in nats, of the real tokens of texts that follow a real one."""
    ids = inputs if isinstance(inputs, torch.Tensor) else inputs["input_ids"]
    real = real_tokens(inputs)
    counted = real[:, 1:] & real[:, :-1]
    logits = head_logits(model, run(model, inputs)[:, :-1][counted])
    return float(cross_entropy(logits, ids[:, 1:][counted]))
