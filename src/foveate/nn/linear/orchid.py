"""Orchid: a long convolution whose kernel is made from the sequence (2024, paper 2)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from foveate import ops
from foveate.ops import Mask
from foveate.registry import Card, register

KINDS = ("power", "correlation", "none")
# Frequencies of the position features of a kernel, and the bounds of its decay over the sequence.
_FEATURES, _SLOW, _FAST = 3, 1.5, 0.3


class Implicit(nn.Module):
    """Kernels as functions of the time from 0 to 1: sines of sines, under a decay per channel."""

    decay: Tensor

    def __init__(self, dim: int, width: int, **made: Any) -> None:
        super().__init__()
        sizes = (_FEATURES, width, width, width)
        self.inner = nn.ModuleList(nn.Linear(n, width, **made) for n in sizes[:3])
        self.pace = nn.Parameter(torch.ones(width, **made))
        self.out = nn.Linear(width, dim, bias=False, **made)
        rates = torch.linspace(_SLOW, _FAST, dim, **made)
        self.register_buffer("decay", -math.log(0.01) / rates, persistent=False)

    def forward(self, length: int) -> Tensor:
        """Kernels (dim, length)."""
        weight = self.out.weight
        time = torch.linspace(0, 1, length, device=weight.device, dtype=weight.dtype)
        turn = 2 * math.pi * time
        x = torch.stack((time, turn.cos(), turn.sin()), -1)
        for layer in self.inner:
            x = torch.sin(self.pace * layer(x))
        y: Tensor = self.out(x).mT * torch.exp(-self.decay[:, None] * time)
        return y


class Adaptive(nn.Module):
    """A kernel for each channel of each row, made from the spectrum of the row."""

    def __init__(self, dim: int, kind: str, circular: bool, **made: Any) -> None:
        super().__init__()
        self.kind, self.circular = kind, circular
        near = {"kernel_size": 3, "groups": dim, **made}
        count = 1 if kind == "power" else 2
        self.local = nn.ModuleList(nn.Conv1d(dim, dim, **near) for _ in range(count))
        self.norm = nn.LayerNorm(dim, **made)
        # What leaves a channel is the real and the imaginary part of its kernel's spectrum.
        self.mix = nn.Conv1d(dim * count, 2 * dim, padding=1, **near)
        self.even = nn.LayerNorm(2 * dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, dim) -> kernels in time (B, dim, L)."""
        length = x.shape[1]
        size = length if self.circular else 2 * length
        parts = [layer(wrapped(x.mT, 1, 1, self.circular)).mT for layer in self.local]
        spectra = [torch.fft.rfft(self.norm(y).mT.float(), n=size) for y in parts]
        if self.kind == "power":
            shown = spectra[0].abs().square()
        else:  # real and imaginary parts of a channel side by side
            shown = torch.view_as_real(spectra[1].conj() * spectra[0]).movedim(-1, 2).flatten(1, 2)
        mixed = self.even(self.mix((shown / size).to(x.dtype)).mT).float()
        spectrum = torch.view_as_complex(mixed.unflatten(-1, (-1, 2)).contiguous())
        return torch.fft.irfft(spectrum.mT, n=size)[..., :length].to(x.dtype)


@register(
    Card(
        name="orchid",
        title="Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling",
        year=2024,
        paper=2,
        claim="a convolution whose kernel depends on the sequence mixes all tokens at a cost that "
        "hardly grows faster than their number",
        kind="module",
        family="linear",
        patterns=("noncausal self",),
        pretrained="scratch",
        cost="O(L·log L·D) time",
        decoding="none: the kernel depends on the whole sequence",
        confidence="high for the official default; the paper's spectrum is |F|, the code's |F|²",
        small={"dim": 32},
    )
)
class Orchid(nn.Module):
    """s₀ ⊙ conv(s₁ ⊙ v, fixed + adaptive kernel), and a fixed convolution of x beside it.

    s₀, s₁ and v are projections after a convolution of 3 tokens. The adaptive kernel comes from the
    "power" spectrum of a projection, from the "correlation" of two convolutions of it, or there is
    "none". `circular` lets all convolutions over time wrap around; `width` is that of the network
    that fixed kernels are functions of. Padding is cut out: a row is mixed at its own length.
    Raises ValueError for another kind.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: Literal["power", "correlation", "none"] = "power",
        circular: bool = True,
        width: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ops.check_block("dim", dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        ops.check_block("width", width)
        self.circular = circular
        self.inner = nn.Linear(dim, 3 * dim, **made)
        self.near = nn.Conv1d(3 * dim, 3 * dim, 3, groups=3 * dim, **made)
        self.fixed, self.beside = (Implicit(dim, width, **made) for _ in range(2))
        self.skips = nn.Parameter(torch.randn(2, dim, **made))
        self.adaptive = None if kind == "none" else Adaptive(dim, kind, circular, **made)
        self.out = nn.Linear(dim, dim, **made)

    def forward(self, x: Tensor, *, causal: bool = False, mask: Mask | None = None) -> Tensor:
        """x (B, L, dim) -> (B, L, dim); 0 for tokens that `mask`, `ops.padding(valid)`, hides.

        Raises ValueError where causality is asked for, and for another mask.
        """
        if causal:
            raise ValueError("orchid is never causal: its kernels depend on the whole sequence")
        valid = ops.real_tokens(mask, x.shape[0], x.shape[1])
        if valid is None:
            return self.mixed(x)
        y = torch.zeros_like(x)
        for row, real in enumerate(valid):
            if real.any():
                y[row, real] = self.mixed(x[row : row + 1, real])[0]
        return y

    def mixed(self, x: Tensor) -> Tensor:
        """x (B, L, dim) -> (B, L, dim)."""
        parts = self.inner(x)
        near = self.near(wrapped(parts.mT, 2, 0, self.circular)).mT
        gate, other, v = near.chunk(3, -1)
        y = self._convolved(other * v, self.kernel(parts.chunk(3, -1)[2]), self.skips[0]) * gate
        out: Tensor = self.out(y + self._convolved(x, self.beside(x.shape[1]), self.skips[1]))
        return out

    def kernel(self, x: Tensor) -> Tensor:
        """Kernels (dim, L), or with an adaptive part (B, dim, L), for the projection x."""
        fixed: Tensor = self.fixed(x.shape[1])
        return fixed if self.adaptive is None else fixed + self.adaptive(x)

    def _convolved(self, x: Tensor, kernel: Tensor, skip: Tensor) -> Tensor:
        """A long convolution and x itself, a little."""
        return ops.fft_conv(x, kernel, circular=self.circular) + skip * x


def wrapped(x: Tensor, before: int, after: int, circular: bool) -> Tensor:
    """x (B, C, L) with so many more tokens at its ends: zeros, or those of the other end."""
    if not circular:
        return pad(x, (before, after))
    at = torch.arange(-before, x.shape[2] + after, device=x.device) % x.shape[2]
    return x[..., at]
