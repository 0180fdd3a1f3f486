"""Learning to Deceive with Attention-Based Explanations (2019, paper 247)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate import ops
from foveate.ops import Mask
from foveate.registry import Card, register

_CLASS, _ALLOWED, _FORBIDDEN = range(3)


@register(
    Card(
        name="deceptive_attn",
        title="Learning to Deceive with Attention-Based Explanations",
        year=2019,
        paper=247,
        claim="attention can be trained to hide the tokens that a model decides by, at hardly any "
        "loss of accuracy",
        kind="analysis",
        family="analysis",
        patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
        pretrained="fine-tune",
        cost="two log-sum-exps of the penalised rows",
        confidence="high",
    )
)
@dataclass(frozen=True, kw_only=True)
class DeceptiveAttn:
    """A penalty, -weight · log(1 - m), on the mass m that attention gives to forbidden keys.

    Of several heads (or target steps) the penalties are averaged with heads="mean", and with "max"
    only the head that looks at forbidden keys most is penalised.
    """

    weight: float = 1.0
    heads: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")
        if self.heads not in ("mean", "max"):
            raise ValueError(f'heads must be "mean" or "max", got {self.heads!r}')

    def __call__(self, logits: Tensor, forbidden: Tensor) -> Tensor:
        """The penalty () to add to a loss: mean over the rows that have an allowed key, or 0.

        logits (B, L) of one row, or (B, heads, L), -inf where nothing may be seen; forbidden
        (B, L) bool. Raises ValueError for other shapes.
        """
        if logits.dim() not in (2, 3) or forbidden.shape != (len(logits), logits.shape[-1]):
            raise ValueError(
                "logits must be (B, L) or (B, heads, L) and forbidden (B, L), "
                f"got {tuple(logits.shape)} and {tuple(forbidden.shape)}"
            )
        by_head = logits if logits.dim() == 3 else logits[:, None]
        kept = log_allowed_mass(by_head, forbidden[:, None])
        each = -kept.mean(1) if self.heads == "mean" else -kept.amin(1)
        rows = (by_head.isfinite() & ~forbidden[:, None]).flatten(1).any(1)
        return self.weight * each.sum() / rows.sum().clamp_min(1)


def log_allowed_mass(logits: Tensor, forbidden: Tensor) -> Tensor:
    """log(1 - m) (…) of logits (…, L): 0 for a row that has no allowed key.

    A difference of log-sum-exps, which has a gradient even where m is 1 but for rounding.
    """
    allowed = logits.isfinite() & ~forbidden
    some = allowed.any(-1, keepdim=True)
    logits = logits.masked_fill(~some, 0.0)
    kept = logits.masked_fill(some & ~allowed, float("-inf"))
    return torch.logsumexp(kept, -1) - torch.logsumexp(logits, -1)


def unmixed(forbidden: Tensor, row: int = 0) -> Mask:
    """The rule that keeps forbidden (B, L) bool and other tokens apart but in one row.

    That row, of the class token, sees all and is seen by itself alone, so that whatever it reads
    of forbidden tokens passes through its own weights.
    """
    ids = torch.where(forbidden, _FORBIDDEN, _ALLOWED)
    ids[:, row] = _CLASS
    links = torch.eye(3, dtype=torch.bool)
    links[_CLASS] = True
    return ops.groups(ids, links)
