"""RoPE times ALiBi: rotary positions and a linear penalty on distance (2024, paper 121)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Attention, Call, Result, dense_result
from foveate.registry import Card, register

# Query rows that share a row of biases.
_ROWS = 256


@register(
    Card(
        name="rope_alibi",
        title="The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in "
        "Generative AI",
        claim="rotary positions and a penalty on distance together hold beyond the trained length",
        kind="attention",
        family="decode",
        year=2024,
        paper=121,
        pretrained="scratch",
        cost="that of dense attention, and a row of Lk biases per head",
        decoding="the same penalty over the full cache",
        confidence="low: only the idea and the harmonic slopes were read",
        small={"slope": 1.0},
        full={"slope": 0.0},
    )
)
@dataclass(frozen=True, kw_only=True)
class RopeALiBi(Attention):
    """Dense attention whose logits fall by slope / (h + 1) for each token between, in head h.

    Queries and keys come rotated, as from a model with rotary positions. A `slope` of 0 is plain
    attention.
    """

    slope: float = 1.0

    def __post_init__(self) -> None:
        if self.slope < 0:
            raise ValueError(f"slope must be at least 0, got {self.slope}")

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Rows of queries, each with one row of biases.

        A softmax does not feel what is added to a whole row of logits: for keys before the query
        -m·(i - j) is as good as m·(j - i0), the same for every query. With i0 near the queries it
        is also exact where it matters, at small distances.
        """
        if self.slope == 0:
            return dense_result(q, k, v, call)
        wide = torch.promote_types(q.dtype, torch.float32)
        heads = torch.arange(q.shape[1], device=q.device, dtype=wide).view(1, -1, 1, 1)
        slopes, past, parts = self.slope / (heads + 1), k.shape[2] - q.shape[2], []
        for lo in range(0, max(q.shape[2], 1), _ROWS):
            hi = min(lo + _ROWS, q.shape[2])
            keys = slice(0, past + hi)
            tile = q[:, :, lo:hi], k[:, :, keys], v[:, :, keys]
            ahead = torch.arange(-past - lo, hi - lo, device=q.device)
            out, lse = ops.attend(*tile, bias=slopes * ahead, return_lse=True, **call.options())
            moved = torch.arange(hi - lo, device=q.device)
            parts.append((out, lse - slopes[..., 0] * moved))
        outs, lses = zip(*parts, strict=True)
        return Result(torch.cat(outs, 2), torch.cat(lses, 2))
