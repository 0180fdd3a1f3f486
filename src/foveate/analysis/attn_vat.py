"""Virtual adversarial training of attention (2021, paper 259)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from foveate.analysis._perturbation import check_options, slope, steepest
from foveate.registry import Card, register

# Below this step the gradient of the divergence is rounding.
_LEAST_PROBE = 1e-3


@register(
    Card(
        name="attn_vat",
        title="Making Attention Mechanisms More Robust and Interpretable with Virtual Adversarial "
        "Training",
        year=2021,
        paper=259,
        claim="predictions kept the same under the worst perturbation of attention logits, of "
        "unlabelled texts too, raise accuracy",
        kind="analysis",
        family="analysis",
        patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
        pretrained="fine-tune",
        cost="three further passes of what follows the logits, and one backward pass",
        confidence="medium-high",
    )
)
@dataclass(frozen=True, kw_only=True)
class AttnVAT:
    """`weight` times how far predictions move under the worst perturbation of attention logits.

    The worst r of size epsilon is found from the gradient of the divergence at `probe` times a
    random direction, since at 0 it has none. norm as in `attn_at`: "example" is a 2-norm,
    "position" the interpretable variant with coefficients normalised for each position.
    """

    epsilon: float = 1.0
    probe: float = 0.1
    weight: float = 1.0
    norm: Literal["example", "position"] = "example"

    def __post_init__(self) -> None:
        check_options(self.norm, epsilon=self.epsilon, weight=self.weight)
        if self.probe < _LEAST_PROBE:
            raise ValueError(f"probe must be at least {_LEAST_PROBE}, got {self.probe}")

    def __call__(
        self, predict: Callable[[Tensor], Tensor], logits: Tensor, *, seed: int = 0
    ) -> Tensor:
        """The term () to add to a loss of the labelled rows; no label is asked for.

        `predict` turns attention logits (B, …), -inf where nothing may be seen, into those of the
        classes (B, classes), or of yes (B, 1).
        """
        with torch.no_grad():
            plain = _log_probabilities(predict(logits))
        moved = logits + self.perturbation(predict, logits, seed=seed)
        return self.weight * _divergence(plain, predict(moved)).mean()

    def perturbation(
        self, predict: Callable[[Tensor], Tensor], logits: Tensor, *, seed: int = 0
    ) -> Tensor:
        """The worst r of the shape of logits, a constant; 0 where nothing may be seen."""
        made = torch.Generator().manual_seed(seed)
        start = torch.randn(logits.shape, generator=made, dtype=logits.dtype).to(logits.device)
        start = steepest(start.masked_fill(~logits.isfinite(), 0.0), self.probe, "example")
        with torch.no_grad():
            plain = _log_probabilities(predict(logits))
        gradient = slope(lambda at: _divergence(plain, predict(at)), logits + start)
        return steepest(gradient, self.epsilon, self.norm)


def _log_probabilities(classes: Tensor) -> Tensor:
    """Of logits of classes (B, n); a single one is that of yes against 0."""
    if classes.shape[-1] == 1:
        classes = torch.cat((classes, torch.zeros_like(classes)), -1)
    return classes.log_softmax(-1)


def _divergence(plain: Tensor, classes: Tensor) -> Tensor:
    """KL (B,) of what is predicted from what was, in nats."""
    return kl_div(_log_probabilities(classes), plain, reduction="none", log_target=True).sum(-1)
