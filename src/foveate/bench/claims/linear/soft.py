"""Softmax-free attention (2024, paper 251): which normalisation bounds the matrix."""

from __future__ import annotations

import torch

from foveate.bench.claims import Outcome
from foveate.nn.linear.soft import NORMALIZE, nystrom

CLAIM = (
    "normalised by its row sums, the matrix of landmarks has a norm that does not grow with tokens"
)

_SIDES, _LANDMARKS, _WIDTH = (14, 28, 56), 49, 32


@torch.inference_mode()
def measure() -> Outcome:
    """Spectral norm of the matrix of 14², 28² and 56² random tokens, 49 of them landmarks.

    Tokens are random, of 32 channels, with logits as of the layer's scaled queries.
    """
    made = torch.Generator().manual_seed(0)
    tokens = torch.randn(_SIDES[-1] ** 2, _WIDTH, generator=made, dtype=torch.float64)
    tokens *= _WIDTH**-0.25
    norms = {(name, side): _norm(tokens[: side**2], name) for name in NORMALIZE for side in _SIDES}
    figures = {f"norm, {name}, {side}² tokens": norm for (name, side), norm in norms.items()}
    bounded = all(norms["rows", side] < 1.01 for side in _SIDES)
    grows = all(norms[name, 56] > 4 * norms[name, 14] for name in ("landmarks", "none"))
    return Outcome(figures, bounded and grows)


def _norm(x: torch.Tensor, normalize: str) -> float:
    """The largest singular value, by power iteration on the symmetric matrix."""
    v = torch.ones(len(x), 1, dtype=x.dtype)
    for _ in range(50):
        v = v / v.norm()
        v = nystrom(x, x[:_LANDMARKS], v, normalize=normalize)
    return float(v.norm())
