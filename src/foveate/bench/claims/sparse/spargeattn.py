"""SpargeAttn (2025, paper 180): pooled scores are trusted only for self-similar blocks."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from foveate import ops
from foveate.attention.base import Call
from foveate.attention.sparse.spargeattn import SpargeAttn
from foveate.bench.claims import Outcome

CLAIM = "reading blocks that are not self-similar whole errs less than trusting their mean"

_SIDE, _DIM, _HEADS = 64, 32, 2


def measure() -> Outcome:
    """Relative L1 on an image with rough patches, at theta 0.6 and without a theta.

    tau is 0.9 with the rule; without it the smallest that reads at least as much.
    """
    made = torch.Generator().manual_seed(0)
    rough = _blurred(torch.randn(1, 1, _SIDE, _SIDE, generator=made), 9)
    rough = (rough > rough.quantile(0.75)).float()
    q, k = (_field(rough, made) for _ in "qk")
    v = torch.randn(1, _HEADS, _SIDE**2, _DIM, generator=made)
    want = ops.attend(q, k, v)

    def seen(theta: float, tau: float) -> tuple[float, float]:
        """Density and error."""
        mechanism = SpargeAttn(theta=theta, tau=tau, block=64)
        layout = mechanism.select(q, k, Call(causal=False))
        density = 1.0 if layout is None else layout.density(causal=False)
        gap = (mechanism(q, k, v, causal=False) - want).abs().sum() / want.abs().sum()
        return density, float(gap)

    density, error = seen(0.6, 0.9)
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if seen(-1.0, middle)[0] >= density else (middle, high)
    trusting = seen(-1.0, high)
    figures = {
        "density, self-similar blocks only": density,
        "density, all blocks": trusting[0],
        "L1, self-similar blocks only": error,
        "L1, all blocks": trusting[1],
    }
    return Outcome(figures, error < trusting[1], "an image of smooth and rough patches")


def _field(rough: Tensor, made: torch.Generator) -> Tensor:
    """Vectors (1, H, side², D) that drift over the image, and jump in its rough patches."""
    noise = torch.randn(_HEADS, _DIM, _SIDE, _SIDE, generator=made)
    smooth = _blurred(noise.flatten(0, 1)[:, None], 25).view_as(noise)
    field = torch.where(rough[0] > 0, noise, smooth / smooth.std())
    return 1.5 * field.flatten(2).transpose(1, 2)[None]


def _blurred(x: Tensor, width: int) -> Tensor:
    """x (N, 1, side, side) blurred along both axes."""
    kernel = torch.hann_window(width).view(1, 1, 1, -1)
    x = conv2d(x, kernel, padding="same")
    return conv2d(x, kernel.transpose(2, 3), padding="same")
