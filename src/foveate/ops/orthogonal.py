"""Orthogonal matrices: principal axes, and a way to train a matrix that stays orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(x: Tensor) -> Tensor:
    """Sums over points x (…, T, n) of (x, 1)(x, 1)ᵀ, (…, n + 1, n + 1) in float64.

    Those of several sets of points add up to those of all.
    """
    wide = torch.cat((x, torch.ones_like(x[..., :1])), -1).double()
    return wide.mT @ wide


def principal_axes(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (…, n) and axes (…, n, n) of the points behind `moments`, at least one; in float64.

    Axes are orthonormal columns, the one along which the points vary most first: the first r of
    them span the subspace around the mean that lies nearest to the points.
    """
    means = sums / sums[..., -1:, -1:]
    mean = means[..., :-1, -1]
    covariance = means[..., :-1, :-1] - mean[..., None] * mean[..., None, :]
    return mean, torch.linalg.eigh(covariance).eigenvectors.flip(-1)


def cayley(x: Tensor) -> Tensor:
    """The orthogonal matrix (I − A/2)⁻¹(I + A/2) of A = x − xᵀ, for any square x (…, n, n).

    It is the identity at x = 0 and has determinant 1; gradients go through it. In at least
    float32. Raises ValueError for what is not square.
    """
    if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"x must be square matrices (…, n, n), got {tuple(x.shape)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    half = (x - x.mT) / 2
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    turned: Tensor = torch.linalg.solve(one - half, one + half)
    return turned
