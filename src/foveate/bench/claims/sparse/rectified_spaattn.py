"""Rectified SpaAttn (2025, paper 152): re-allocated attention against dropped blocks."""

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Call
from foveate.attention.sparse.rectified_spaattn import RectifiedSpaAttn
from foveate.bench.claims import Outcome

CLAIM = "right weights for what is read, then means for what is not: each lowers the error"

_LENGTH, _HEADS, _DIM, _BLOCK = 2048, 4, 32, 64


def measure() -> Outcome:
    """Relative error on tokens of 1/f noise: critical blocks alone, weighted, and with means."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (_pink(made) for _ in "qkv")
    q, want, figures, falls = 2 * q, ops.attend(2 * q, k, v), {}, []
    for drop in (0.95, 0.85):
        mechanism = RectifiedSpaAttn(shape=(_LENGTH,), block=_BLOCK, drop=drop, p_keep=0.1)
        critical, pooled = mechanism.shares(q, k, Call())
        layout = ops.from_map(critical, _BLOCK, (_LENGTH, _LENGTH))
        read = ops.block_sparse(q, k, v, layout, causal=False)
        left = 1 - pooled.sum(-1, keepdim=True).repeat_interleave(_BLOCK, 2)
        outs = (read, left * read, mechanism(q, k, v, causal=False))
        errors = [float((out - want).norm() / want.norm()) for out in outs]
        falls.append(errors[0] > errors[1] > errors[2])
        figures[f"density, drop {drop}"] = layout.density(causal=False)
        named = zip(("blocks alone", "weighted", "weighted, and means"), errors, strict=True)
        figures |= {f"error of {name}, drop {drop}": error for name, error in named}
    return Outcome(figures, all(falls))


def _pink(made: torch.Generator) -> Tensor:
    """Noise (1, H, L, D) of unit variance whose power falls as 1/f along the sequence."""
    spectrum = torch.fft.rfft(torch.randn(1, _HEADS, _LENGTH, _DIM, generator=made), dim=2)
    falling = torch.arange(spectrum.shape[2]).clamp_min(1).rsqrt()
    noise = torch.fft.irfft(spectrum * falling[:, None], n=_LENGTH, dim=2)
    return noise / noise.std()
