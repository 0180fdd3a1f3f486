"""Computational limits of LoRA: when attention has features of low rank (2024, paper 132)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.analysis.base import Record
from foveate.registry import Card, register

# Features of all degrees that are held for a key.
_MOST = 1 << 14


@register(
    Card(
        name="lora_limits",
        title="Computational Limits of Low-Rank Adaptation (LoRA) Fine-Tuning for Transformer "
        "Models",
        year=2024,
        paper=132,
        claim="low-rank features give attention and its gradients while logits stay below about "
        "the root of log L, and fail above",
        kind="analysis",
        family="analysis",
        patterns=("noncausal self", "noncausal cross"),
        pretrained="exact",
        cost="Σ D^j features a token, and one map a head for its rank",
        confidence="high that errors grow; the hardness result itself is not tested",
    )
)
@dataclass(frozen=True, kw_only=True)
class LoraLimits:
    """Errors of attention by the features of a polynomial, as queries are scaled to larger logits.

    For every bound on |logit|: `output` (relative error of the outputs), `gradient` (that of the
    gradient by the queries, which low-rank updates of W_Q are made from) and `rank` (the least
    rank of any features that give the map to a relative error of eps), by bound and head.
    The polynomial is that of Taylor for exp, of `degree`; an even degree keeps weights above 0.
    """

    bounds: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    degree: int = 2
    eps: float = 0.01

    def __post_init__(self) -> None:
        ops.check_block("degree", self.degree)
        if self.degree % 2:
            raise ValueError(f"degree must be even, got {self.degree}")
        if not self.bounds or min(self.bounds) <= 0:
            raise ValueError(f"bounds must be above 0, got {self.bounds}")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {self.eps}")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Record:
        """Of q (1, Hq, Lq, D), k (1, Hkv, Lk, D) and v (1, Hkv, Lk, Dv), without a mask.

        Raises ValueError for batches, zero logits, and dimensions with too many features.
        """
        shape = ops.check_qkv(q, k, v)
        if shape.batch != 1:
            raise ValueError(f"lora_limits takes one row, got a batch of {shape.batch}")
        largest = ops.grouped_logits(q, k, shape.dim**-0.5).abs().amax((2, 3), keepdim=True)
        if float(largest.min()) == 0:
            raise ValueError("lora_limits needs heads whose logits are not all 0")
        found = [self._at(q * (bound / largest), k, v) for bound in self.bounds]
        rows = zip(("output", "gradient", "rank"), zip(*found, strict=True), strict=True)
        values = {name: torch.stack(own).float() for name, own in rows}
        about = {"bounds": list(self.bounds), "degree": self.degree, "eps": self.eps}
        return Record("lora_limits", values, dict.fromkeys(values, ("bound", "head")), about=about)

    def _at(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Errors of outputs and gradients, and rank, by head (Hq,)."""
        exact = _with_gradient(lambda q: ops.attend(q, k, v), q)
        near = _with_gradient(lambda q: self.attend(q, k, v), q)
        output, gradient = (
            ((a - b).square().sum((0, 2, 3)) / a.square().sum((0, 2, 3))).sqrt()
            for a, b in zip(exact, near, strict=True)
        )
        p = ops.attention_rows(q, k, torch.arange(q.shape[2]))[0]
        singular = torch.linalg.svdvals(p.double())
        left = singular.square().flip(-1).cumsum(-1).flip(-1)
        rank = (left > self.eps**2 * left[:, :1]).sum(-1)
        return output, gradient, rank

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention by features, linear in the length."""
        scale = q.shape[-1] ** -0.25
        fq, fk = (power_features(x * scale, self.degree) for x in (q, k))
        return ops.linear_attention_global(fq, fk, v, eps=0.0)


def power_features(x: Tensor, degree: int) -> Tensor:
    """Features (…, Σ D^j) of x (…, D) whose products are Σ (x·y)^j / j! up to a degree.

    ValueError where these are more than 16,384.
    """
    dim = x.shape[-1]
    count = sum(dim**j for j in range(degree + 1))
    if count > _MOST:
        raise ValueError(f"dimension {dim} has {count} features of degree {degree}, above {_MOST}")
    powers = [torch.ones_like(x[..., :1])]
    for _ in range(degree):
        powers.append((powers[-1][..., None] * x[..., None, :]).flatten(-2))
    return torch.cat([p / math.factorial(j) ** 0.5 for j, p in enumerate(powers)], -1)


def _with_gradient(attend: Callable[[Tensor], Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and the gradient by the queries of half their squares."""
    leaf = q.detach().requires_grad_()
    with torch.enable_grad():
        out = attend(leaf)
        (gradient,) = torch.autograd.grad(out.square().sum() / 2, leaf)
    return out.detach(), gradient
