"""In-Context Linear Regression Demystified: what heads trained on it become (2025, paper 38)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.analysis.base import Record
from foveate.registry import Card, register


@register(
    Card(
        name="icl_regression",
        title="In-Context Linear Regression Demystified: Training Dynamics and Mechanistic "
        "Interpretability of Multi-Head Softmax Attention",
        year=2025,
        paper=38,
        claim="two softmax heads of opposite signs learn a gradient step that the mean of y does "
        "not bias, one head cannot",
        kind="analysis",
        family="analysis",
        patterns=("noncausal cross",),
        pretrained="scratch",
        cost="sums over the heads' matrices",
        confidence="medium-high",
    )
)
@dataclass(frozen=True, kw_only=True)
class IclRegression:
    """How near heads are to omega · x·x' logits and values mu · y.

    By head `omega` (mean diagonal of the x block of KQ), `off` (share of |KQ| that is not
    omega on that diagonal, of what the query can reach), `mu` (weight of y in what is predicted)
    and `off_value` (share of the weights of x there). Of all heads `spread` (standard deviation of
    |omega| over its mean), `balance` (|Σ mu| / Σ |mu|) and `agree` (share of heads whose omega and
    mu have one sign).
    """

    @torch.no_grad()
    def __call__(self, kq: Tensor, ov: Tensor) -> Record:
        """Of heads' matrices KQ and OV (heads, d + 1, d + 1); ValueError for other shapes."""
        _check(kq, ov, kq.shape[-1] - 1)
        reached = kq[:, :, :-1]
        omega = reached.diagonal(dim1=1, dim2=2).mean(-1)
        ideal, _ = reduced(omega, omega, kq.shape[-1] - 1)
        row = ov[:, -1].abs()
        mu, size = ov[:, -1, -1], omega.abs()
        values = {
            "omega": omega,
            "off": _share((reached - ideal[:, :, :-1]).abs().sum((1, 2)), reached),
            "mu": mu,
            "off_value": row[:, :-1].sum(-1) / row.sum(-1),
            "spread": size.std(correction=0) / size.mean(),
            "balance": mu.sum().abs() / mu.abs().sum(),
            "agree": (omega * mu > 0).float().mean(),
        }
        return Record(
            "icl_regression", values, {k: ("head",)[: v.dim()] for k, v in values.items()}
        )


def predict(kq: Tensor, ov: Tensor, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """What softmax heads say of a query (n, d) after examples x (n, L, d), y (n, L, 1): (n, 1).

    kq, ov (heads, d + 1, d + 1) act on tokens (x, y), that of the query having y = 0; the last
    entry of the sum of the heads' outputs is the prediction.
    """
    _check(kq, ov, x.shape[-1])
    tokens = torch.cat((x, y), -1)
    logits = torch.einsum("nlz,hzd,nd->nhl", tokens, kq[:, :, :-1], query)
    return torch.einsum("nhl,nlz,hz->n", logits.softmax(-1), tokens, ov[:, -1])[:, None]


def reduced(omega: Tensor, mu: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """KQ and OV (heads, dim + 1, dim + 1) of heads that are omega (heads,) and mu (heads,)."""
    places = torch.ones(dim + 1, dtype=omega.dtype)
    places[-1] = 0
    kq = omega[:, None, None] * torch.diag(places)
    return kq, mu[:, None, None] * torch.diag(1 - places)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Part (heads,) of the absolute sum of (heads, a, b), 0 of nothing."""
    return part / whole.abs().sum((1, 2)).clamp_min(torch.finfo(part.dtype).tiny)


def _check(kq: Tensor, ov: Tensor, dim: int) -> None:
    want = (len(kq), dim + 1, dim + 1)
    if kq.dim() != 3 or kq.shape != want or ov.shape != want:
        raise ValueError(
            f"KQ and OV must be (heads, {dim + 1}, {dim + 1}), got {tuple(kq.shape)} and "
            f"{tuple(ov.shape)}"
        )
