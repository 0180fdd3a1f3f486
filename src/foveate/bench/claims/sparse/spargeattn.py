"""SpargeAttn (2025, paper 180): pooled scores are trusted only for self-similar blocks."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from foveate import ops
from foveate.attention.base import Call
from foveate.attention.sparse.spargeattn import SpargeAttn
from foveate.bench.claims import Outcome

CLAIM = "reading blocks that are not self-similar whole errs less than trusting their mean"

_SIDE, _PATCH, _DIM, _HEADS = 64, 8, 32, 2


def measure() -> Outcome:
    """Relative L1 on an image with rough patches, at theta 0.6 and without a theta.

    tau is 0.9 with the rule; without it the smallest that reads at least as much.
    """
    made = torch.Generator().manual_seed(0)
    patches = torch.rand(_SIDE // _PATCH, _SIDE // _PATCH, generator=made) < 0.25
    rough = patches.repeat_interleave(_PATCH, 0).repeat_interleave(_PATCH, 1)
    q, k = (_field(rough, made) for _ in "qk")
    v = torch.randn(1, _HEADS, _SIDE**2, _DIM, generator=made)
    want = ops.attend(q, k, v)

    def seen(theta: float, tau: float) -> tuple[float, float]:
        """Density and error."""
        mechanism = SpargeAttn(theta=theta, tau=tau, block=_PATCH**2)
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
    """Vectors (1, H, side², D), patch by patch, that drift over the image or jump where rough."""
    noise = torch.randn(_HEADS, _DIM, _SIDE, _SIDE, generator=made)
    kernel = torch.hann_window(25).view(1, 1, 1, -1)
    smooth = conv2d(noise.flatten(0, 1)[:, None], kernel, padding="same")
    smooth = conv2d(smooth, kernel.transpose(2, 3), padding="same").view_as(noise)
    field = 1.5 * torch.where(rough, noise, smooth / smooth.std())
    patches = field.unflatten(3, (-1, _PATCH)).unflatten(2, (-1, _PATCH))
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(1, _HEADS, _SIDE**2, _DIM)
