"""MambAttention: attention and Mamba over time and over frequency (2025, paper 330)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._linear import head_width
from foveate.nn._planar import Planar
from foveate.nn.linear.s6 import S6
from foveate.registry import Card, register


class Attend(nn.Module):
    """x + attention(norm(x)) without mask, (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim: int, heads: int, **made: Any) -> None:
        super().__init__()
        self.width = head_width(dim, heads)
        self.norm = nn.LayerNorm(dim, **made)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, **made), nn.Linear(dim, dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, dim) -> (B, L, dim)."""
        q, k, v = (heads_of(y, self.width) for y in self.qkv(self.norm(x)).chunk(3, -1))
        y: Tensor = x + self.out(joined_heads(ops.attend(q, k, v)))
        return y


class BothWays(nn.Module):
    """x + a projection of two selective scans with residuals, one along x and one against it."""

    def __init__(self, dim: int, states: int, expand: float, conv: int, **made: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim, **made) for _ in range(2))
        self.scans = nn.ModuleList(
            S6(dim, states=states, expand=expand, conv=conv, **made) for _ in range(2)
        )
        self.out = nn.Linear(2 * dim, dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, dim) -> (B, L, dim)."""
        back = x.flip(1)
        along = x + self.scans[0](self.norms[0](x))
        against = back + self.scans[1](self.norms[1](back))
        y: Tensor = x + self.out(torch.cat((along, against.flip(1)), -1))
        return y


class Block(nn.Module):
    """Attention and scans over rows, then the same attention and other scans over columns."""

    def __init__(self, dim: int, heads: int, *scans: Any, **made: Any) -> None:
        super().__init__()
        self.attend = Attend(dim, heads, **made)
        self.rows, self.columns = (BothWays(dim, *scans, **made) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim, H, W)."""
        x = along_rows(lambda y: self.rows(self.attend(y)), x)
        return along_rows(lambda y: self.columns(self.attend(y)), x.mT).mT


def along_rows(layer: Any, x: Tensor) -> Tensor:
    """A layer on sequences over the rows of every column of x (B, C, H, W), each by itself."""
    sequences = x.permute(0, 3, 2, 1)
    y: Tensor = layer(sequences.flatten(0, 1))
    return y.unflatten(0, sequences.shape[:2]).permute(0, 3, 2, 1)


@register(
    Card(
        name="mambattention",
        title="MambAttention: Mamba with Multi-Head Attention for Generalizable Single-Channel "
        "Speech Enhancement",
        year=2025,
        paper=330,
        claim="attention that time and frequency share helps two-way scans to generalise",
        kind="module",
        family="linear",
        patterns=("noncausal self",),
        pretrained="scratch",
        cost="O(H·W·(H + W)·D) time",
        decoding="none: it sees whole maps",
        confidence="high",
        small={"dim": 32, "heads": 4, "depth": 1, "states": 4, "expand": 1.0},
    )
)
class MambAttention(Planar):
    """`depth` blocks on maps (B, dim, time, frequency): attention and scans along each axis.

    The attention of a block is one and the same for both axes; a scan goes both ways, with
    `states` numbers for each of expand · dim channels. Raises ValueError for sizes that do not
    divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        depth: int = 4,
        states: int = 16,
        expand: float = 4.0,
        conv: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.blocks = nn.ModuleList(
            Block(dim, heads, states, expand, conv, **made)
            for _ in range(ops.check_block("depth", depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim, H, W)."""
        self.check(x)
        for block in self.blocks:
            x = block(x)
        return x
