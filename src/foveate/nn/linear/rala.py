"""Breaking the Low-Rank Dilemma of Linear Attention (2024, paper 255)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._linear import head_width
from foveate.nn._planar import Planar, map_of, tokens_of
from foveate.registry import Card, register

_EPS = 1e-6


def key_weights(fq: Tensor, fk: Tensor) -> Tensor:
    """How much each key counts: N · softmax_j(mean_i fq_i · fk_j / sqrt(K)), 1 in the mean.

    Features fq and fk (B, H, N, K) -> (B, H, N).
    """
    scores = fk @ fq.mean(2, keepdim=True).mT * fk.shape[3] ** -0.5
    return scores[..., 0].softmax(2) * fk.shape[2]


@register(
    Card(
        name="rala",
        title="Breaking the Low-Rank Dilemma of Linear Attention",
        year=2024,
        paper=255,
        claim="keys weighted by the mean query, and outputs by the input, raise the rank that "
        "linear attention lacks",
        kind="module",
        family="linear",
        patterns=("noncausal self",),
        pretrained="scratch",
        cost="O(H·W·D²) time",
        decoding="not applicable: it reads the whole map",
        confidence="high",
        small={"dim": 32, "heads": 4},
    )
)
class RALA(Planar):
    """(Σ_j φq_i·α_jφk_j v_j / Σ_j φq_i·α_jφk_j + conv(v)_i) ⊙ o_i, projected; α are `key_weights`.

    φ is elu + 1; features of the numerator rotate by row and column with base `theta` (None: not at
    all); the convolution is of each channel over `conv` × `conv` cells (0: none); o is a projection
    of the input. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        theta: float | None = 10_000.0,
        conv: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width, self.theta = head_width(dim, heads), theta
        if theta is not None and self.width % 4:
            raise ValueError(f"heads that rotate need a multiple of 4 channels, got {self.width}")
        if conv < 0 or (conv and conv % 2 == 0):
            raise ValueError(f"conv must be odd, or 0 for none, got {conv}")
        self.qkvo = nn.Linear(dim, 4 * dim, bias=False, **made)
        self.local = (
            nn.Conv2d(dim, dim, conv, padding=conv // 2, groups=dim, **made) if conv else None
        )
        self.out = nn.Linear(dim, dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim, H, W)."""
        self.check(x)
        sides = (x.shape[2], x.shape[3])
        q, k, v, o = self.qkvo(tokens_of(x)).chunk(4, -1)
        fq, fk = (ops.feature_map("elu1")(heads_of(y, self.width)) for y in (q, k))
        y = joined_heads(self._attended(fq, fk, heads_of(v, self.width), sides))
        if self.local is not None:
            y = y + tokens_of(self.local(map_of(v, *sides)))
        return map_of(self.out(y * o), *sides)

    def _attended(self, fq: Tensor, fk: Tensor, v: Tensor, sides: tuple[int, int]) -> Tensor:
        """Linear attention to the weighted keys; what it divides by has not rotated."""
        fk = fk * key_weights(fq, fk)[..., None]
        if self.theta is None:
            return ops.linear_attention_global(fq, fk, v, eps=_EPS)
        mass = (fq * fk.mean(2, keepdim=True)).sum(-1, keepdim=True) + _EPS
        tables = self._tables(*sides, fq)
        fq, fk = (ops.rope(y, *tables, interleaved=True) for y in (fq, fk))
        return ops.linear_attention_global(fq, fk / fk.shape[2], v, normalize=False) / mass

    def _tables(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (H·W, width): half of the channels turn by row, half by column."""
        places = [torch.arange(n, device=like.device, dtype=torch.float32) for n in (rows, columns)]
        cells = torch.cartesian_prod(*places)
        pairs = self.width // 4
        rates = float(self.theta or 1.0) ** -torch.linspace(0, 1, pairs, device=like.device)
        angles = (cells[..., None] * rates).flatten(1).repeat_interleave(2, -1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
