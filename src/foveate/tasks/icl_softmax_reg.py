"""Softmax regression in context.

"The Closeness of In-Context Learning and Weight Shifting for Softmax Regression" (2023, paper 40).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.tasks.batch import check_at_least


class SoftmaxRegressions(NamedTuple):
    """Examples a (n, L, d) with b (n, L) = softmax(a x), and the x (n, d) to be found.

    In context: query (n, d) and target (n,), the b of the query under the examples' normaliser, so
    that it does not follow from the sum of the examples' b. log b = a·x - c, with c the same for a
    row, is linear.
    """

    a: Tensor
    b: Tensor
    query: Tensor
    target: Tensor
    x: Tensor

    def loss(self, x: Tensor) -> Tensor:
        """½‖softmax(a x) - b‖² (n,) of x (n, d): unlike the norm it has a gradient at 0."""
        return 0.5 * (self._softmax(x) - self.b).square().sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """Its gradient (n, d), aᵀ(diag f - f fᵀ)(f - b) with f = softmax(a x)."""
        f = self._softmax(x)
        off = f - self.b
        return torch.einsum("nld,nl->nd", self.a, f * (off - (f * off).sum(-1, keepdim=True)))

    def descend(self, steps: int, rate: float = 1.0) -> Tensor:
        """x (n, d) after `steps` gradient steps from 0; with peaked b, rates above 1 overshoot."""
        check_at_least(0, steps=steps)
        x = torch.zeros_like(self.x)
        for _ in range(steps):
            x = x - rate * self.gradient(x)
        return x

    def predict(self, x: Tensor) -> Tensor:
        """The b of the query (n,) that x (n, d) implies."""
        normaliser = torch.einsum("nld,nd->nl", self.a, x).logsumexp(-1)
        return ((self.query * x).sum(-1) - normaliser).exp()

    def _softmax(self, x: Tensor) -> Tensor:
        return torch.einsum("nld,nd->nl", self.a, x).softmax(-1)


def icl_softmax_reg(
    rows: int, *, seed: int, length: int = 20, dim: int = 5, dtype: torch.dtype = torch.float32
) -> SoftmaxRegressions:
    """a ~ N(0, 1), x ~ N(0, I / dim), new in every row, with `length` examples and a query."""
    check_at_least(2, length=length)
    check_at_least(1, rows=rows, dim=dim)
    made = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, length + 1, dim, generator=made, dtype=dtype)
    x = torch.randn(rows, dim, generator=made, dtype=dtype) / dim**0.5
    examples, query = a[:, :-1], a[:, -1]
    b = torch.einsum("nld,nd->nl", examples, x).softmax(-1)
    made_of = SoftmaxRegressions(examples, b, query, b[:, 0], x)
    return made_of._replace(target=made_of.predict(x))
