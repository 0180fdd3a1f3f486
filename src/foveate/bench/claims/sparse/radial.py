"""Radial attention (2025, paper 39): a window that narrows with the distance in time."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.sparse.radial import Radial
from foveate.bench.claims import Outcome
from foveate.ops import Mask

CLAIM = "at one density, a window that narrows with time keeps more mass than a constant one"

_FRAMES, _SIDE, _HEADS, _DIM = 64, 8, 4, 64


def measure() -> Outcome:
    """Retained mass in a video whose scores fall along an exponential in space and in time."""
    (q, k), length = video(), _FRAMES * _SIDE**2
    _, dense = ops.attend(q, k, k, return_lse=True)
    radial = Radial(shape=(_FRAMES, _SIDE, _SIDE)).rule().to_dense(length, length)
    density = float(radial.double().mean())
    made = torch.Generator().manual_seed(1)
    ways = {
        "radial": radial,
        "constant window": constant(density).to_dense(length, length),
        "random pairs": torch.rand(1, 1, length, length, generator=made) < density,
    }
    figures = {f"density, {name}": float(seen.double().mean()) for name, seen in ways.items()}
    mass = {}
    for name, seen in ways.items():
        _, lse = ops.attend(q, k, k, mask=ops.dense(seen), return_lse=True)
        mass[name] = float(torch.exp(lse - dense).mean())
    figures |= {f"retained mass, {name}": share for name, share in mass.items()}
    return Outcome(figures, mass["radial"] > max(mass["constant window"], mass["random pairs"]))


def constant(density: float) -> Mask:
    """The first frame and, in all frames, places nearer than a width that gives `density`."""
    size, first = _SIDE**2, 1 / _FRAMES
    width = 1
    while first + (1 - first) * (1 - (size - width) * (size - width + 1) / size**2) < density:
        width += 1
    return ops.sinks(size) | Mask(lambda b, h, q, k: (q % size - k % size).abs() < width)


def video() -> tuple[Tensor, Tensor]:
    """q and k (1, heads, L, dim) whose products fall by e over 4 frames and over 4 pixels.

    The mean of cos(w · distance) over w from a Cauchy distribution is an exponential of distance.
    """
    made = torch.Generator().manual_seed(0)
    axes = [torch.arange(n) for n in (_FRAMES, _SIDE, _SIDE)]
    at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3).float()
    turn = torch.rand(_HEADS, _DIM // 2, 3, generator=made) - 0.5
    angles = torch.einsum("ln,hdn->hld", at, (torch.pi * turn).tan() / 4)
    code = torch.cat((angles.cos(), angles.sin()), -1)[None]
    q, k = (code + torch.randn(code.shape, generator=made) for _ in range(2))
    return q, k
