"""Attention Meets Perturbations: adversarial training of attention (2020, paper 136)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from foveate.analysis._perturbation import check_options, slope, steepest
from foveate.registry import Card, register


@register(
    Card(
        name="attn_at",
        title="Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial "
        "Training",
        year=2020,
        paper=136,
        claim="training against the worst perturbation of attention logits raises accuracy, and "
        "the agreement of attention with gradients",
        kind="analysis",
        family="analysis",
        patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
        pretrained="fine-tune",
        cost="two further passes of what follows the logits, and one backward pass",
        confidence="high for norm example; which norm the interpretable variant means is open",
    )
)
@dataclass(frozen=True, kw_only=True)
class AttnAT:
    """The loss of attention logits a, plus `weight` times that of a + r, r being the worst case.

    To first order that is r = epsilon g / ‖g‖ of the gradient g, in every example. The
    interpretable variant weights the differences of every logit to all others: made unit vectors
    they give the same r when their coefficients are normalised for the whole example (norm
    "example"), and epsilon · sign(g) when they are for every position ("position").
    """

    epsilon: float = 1.0
    weight: float = 1.0
    norm: Literal["example", "position"] = "example"

    def __post_init__(self) -> None:
        check_options(self.norm, epsilon=self.epsilon, weight=self.weight)

    def __call__(self, loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        """The objective () to minimise; `loss` turns logits (B, …) into the losses (B,).

        Logits are -inf where nothing may be seen. For the layers of a transformer they may be
        zeros (B, Hq, Lq, Lk) that `loss` adds by `AttentionNoise`.
        """
        plain = loss(logits).mean()
        return plain + self.weight * loss(logits + self.perturbation(loss, logits)).mean()

    def perturbation(self, loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        """The worst r of the shape of logits, a constant; 0 where nothing may be seen."""
        return steepest(slope(loss, logits), self.epsilon, self.norm)
