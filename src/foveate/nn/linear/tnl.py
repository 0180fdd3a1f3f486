"""Various Lengths, Constant Speed: TransNormerLLM (2024, paper 37)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import joined_heads
from foveate.nn._stack import Stack, SwiGLU, gated_width
from foveate.nn.linear.lightning2 import Lightning2
from foveate.registry import Card, register

_EPS = 1e-8


@register(
    Card(
        name="tnl",
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning "
        "Attention",
        year=2024,
        paper=37,
        claim="a language model of linear attention with decay is as good as one of softmax, at a "
        "speed that does not depend on length",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·(C + D)·D) time in blocks of C tokens",
        decoding="a state of heads · D² numbers, twice as many in the first layer",
        confidence="medium-high; the texts differ on an activation of the gate, here it has none",
        small={"dim": 32, "heads": 4, "layers": 2},
    )
)
class TNL(Lightning2):
    """Lightning attention with a gate; heads of upper layers remember longer ("tnl" slopes).

    In the first layer (`index` 0) channels of queries and keys turn with their distance, by learned
    angles: Σ_c q_c k_c cos(θ_c (t - j)). All heads together have one norm, without weights.
    `TransNormer` is the model around it. Raises ValueError for sizes that do not divide and an
    index that is not below `layers`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        index: int = 0,
        layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, decay="tnl", index=index, layers=layers, **made)
        angles = (10_000.0 ** (-2 * torch.arange(dim) / dim)).view(heads, 1, -1).to(**made)
        self.angles = nn.Parameter(angles) if index == 0 else None

    def way_out(self, heads: int, made: dict[str, Any]) -> nn.Module:
        """Norm, gate and projection."""
        return _Gated(self.dim, **made)

    def split(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k have a cosine and a sine part where they turn."""
        q, k, v = super().split(x, at)
        if self.angles is not None:
            turns = at[:, None, :, None] * self.angles.float()
            wave = torch.cat((turns.cos(), turns.sin()), -1).to(x.dtype)
            q, k = (torch.cat((y, y), -1) * wave for y in (q, k))
        return q, k, v


class _Gated(nn.Module):
    """(norm(heads) ⊙ x W_u) W_o, the norm over all heads and without weights."""

    def __init__(self, dim: int, **made: Any) -> None:
        super().__init__()
        self.norm = _plain_norm(dim)
        self.gate, self.out = (nn.Linear(dim, dim, bias=False, **made) for _ in range(2))

    def forward(self, heads: Tensor, x: Tensor) -> Tensor:
        """Heads (B, H, L, width) and the layer's input x (B, L, dim) -> (B, L, dim)."""
        y: Tensor = self.out(self.norm(joined_heads(heads)) * self.gate(x))
        return y


class _SGLU(SwiGLU):
    """x -> (x W_1 ⊙ x W_2) W_3 with `width` inner channels."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, dim) -> (…, dim)."""
        y: Tensor = self.down(self.gate(x) * self.up(x))
        return y


class TransNormer(Stack):
    """`layers` of x + tnl(norm(x)) and x + SGLU(norm(x)), norms without weights.

    `mlp` is the inner width of the gated unit (None: 8/3 dim). Called like a `Stack`; raises
    ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        *,
        mlp: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, "tnl", heads=heads, layers=layers, **made)
        inner = gated_width(dim) if mlp is None else ops.check_block("mlp", mlp)
        for block in self.blocks:
            block.norm, block.mlp_norm = _plain_norm(dim), _plain_norm(dim)
            block.mlp = _SGLU(dim, inner, **made)
        self.norm = _plain_norm(dim)


def _plain_norm(dim: int) -> nn.RMSNorm:
    return nn.RMSNorm(dim, _EPS, elementwise_affine=False)
