"""Linear regression in context, with its best predictors.

"In-Context Linear Regression Demystified" (2025, paper 38).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.tasks.batch import check_at_least


class Regressions(NamedTuple):
    """Examples x (n, L, d) and y (n, L, m), query (n, d) and target (n, m): m components.

    Component c depends on block c of x alone: coordinates c·d/m to (c + 1)·d/m.
    """

    x: Tensor
    y: Tensor
    query: Tensor
    target: Tensor

    def loss(self, predicted: Tensor) -> Tensor:
        """Mean squared error of predictions (n, m)."""
        return (predicted - self.target).square().mean()

    def ridge(self, noise: float) -> Tensor:
        """Posterior mean (n, m) of the target, which no predictor beats; `noise` is the data's."""
        x, query = self._blocks()
        size = x.shape[-1]
        gram = x.mT @ x + size * noise**2 * torch.eye(size, dtype=x.dtype)
        moment = torch.einsum("nmld,nlm->nmd", x, self.y)
        weight = torch.linalg.solve(gram, moment[..., None])[..., 0]
        return (weight * query).sum(-1)

    def gradient_step(self, rate: float, *, debiased: bool = False) -> Tensor:
        """Prediction (n, m) after a step of `rate` from 0, rate / L Σ y x·query.

        `debiased` takes the mean of y off first, and is blind to what shifts all y.
        """
        x, query = self._blocks()
        y = self.y - self.y.mean(1, keepdim=True) if debiased else self.y
        return rate / x.shape[2] * torch.einsum("nlm,nmld,nmd->nm", y, x, query)

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """x (n, m, L, d / m) and query (n, m, d / m)."""
        parts = (self.y.shape[-1], -1)
        return self.x.unflatten(-1, parts).transpose(1, 2), self.query.unflatten(-1, parts)


def icl_linreg(
    rows: int,
    *,
    seed: int,
    length: int = 20,
    dim: int = 8,
    noise: float = 0.5,
    correlation: float = 0.0,
    components: int = 1,
    noisy_target: bool = False,
) -> Regressions:
    """y = w·x + noise·ε with w ~ N(0, I / d), new in every row, for `length` examples and a query.

    x ~ N(0, Σ), Σ_ij = correlation^|i - j|, so that Var(w·x) = 1. With `components` m each has a
    block of d / m coordinates and weights of its own, drawn so that its variance is 1 too. The
    target has noise only when `noisy_target`, which adds noise² to what every predictor loses.
    """
    check_at_least(1, rows=rows, length=length, dim=dim, components=components)
    check_at_least(0, noise=noise)
    if dim % components:
        raise ValueError(f"dim must be a multiple of {components} components, got {dim}")
    if not -1 < correlation < 1:
        raise ValueError(f"correlation must be between -1 and 1, got {correlation}")
    made = torch.Generator().manual_seed(seed)
    at = torch.arange(dim)
    covariance = torch.tensor(float(correlation)) ** (at[:, None] - at).abs()
    x = torch.randn(rows, length + 1, dim, generator=made) @ torch.linalg.cholesky(covariance).T
    size = dim // components
    weights = torch.randn(rows, components, size, generator=made) / size**0.5
    y = torch.einsum("nlcd,ncd->nlc", x.unflatten(-1, (components, size)), weights)
    clean = y[:, -1]
    y = y + noise * torch.randn(y.shape, generator=made)
    return Regressions(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1] if noisy_target else clean)


def best_rate(length: int, dim: int, noise: float, *, debiased: bool = False) -> float:
    """The rate of the gradient step that loses least, for uncorrelated x of `dim` coordinates."""
    return length / (length + dim + (not debiased) + dim * noise**2)
