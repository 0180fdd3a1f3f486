"""Bridging the Divide: Reconsidering Softmax and Linear Attention (2024, paper 252)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._linear import head_width
from foveate.nn._planar import Planar, convolved, map_of, tokens_of
from foveate.registry import Card, register

_KERNEL = 3


def inline_attention(fq: Tensor, fk: Tensor, v: Tensor) -> Tensor:
    """Weights (fq_i·fk_j - mean_l fq_i·fk_l) / (N sqrt(K)) + 1/N: they sum to 1 by subtraction.

    Features fq and fk (B, H, N, K), v (B, H, N, D) -> (B, H, N, D), in time linear in N.
    """
    scale, n = fk.shape[3] ** -0.5, fk.shape[2]
    given = ops.linear_attention_global(fq * (scale / n), fk, v, normalize=False)
    rest = 1 - scale * (fq * fk.mean(2, keepdim=True)).sum(-1, keepdim=True)
    return given + rest * v.mean(2, keepdim=True)


@register(
    Card(
        name="inline",
        title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
        year=2024,
        paper=252,
        claim="linear attention that tells queries apart, and that looks around, is as good as "
        "softmax",
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
class InLine(Planar):
    """`inline_attention` of a map, plus a 3 × 3 convolution of the values.

    The convolution's kernels are made from the mean of the map, one for each channel. `features`
    names φ as in `ops.feature_map`. With `window` each square of so many cells aside is a map of
    its own. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        features: str = "identity",
        window: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width, self.map = head_width(dim, heads), ops.feature_map(features)
        self.window = None if window is None else ops.check_block("window", window)
        self.qkv = nn.Linear(dim, 3 * dim, **made)
        self.kernel = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=heads, **made),
            nn.GELU(),
            nn.Conv1d(dim, dim * _KERNEL**2, 1, groups=heads, **made),
        )
        self.out = nn.Linear(dim, dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim, H, W)."""
        self.check(x)
        if self.window is None:
            return self._attended(x)
        sides, w = x.shape[2:], self.window
        if sides[0] % w or sides[1] % w:
            raise ValueError(
                f"rows and columns must be multiples of window {w}, got {tuple(sides)}"
            )
        tiles = x.unflatten(3, (-1, w)).unflatten(2, (-1, w)).permute(0, 2, 4, 1, 3, 5)
        y = self._attended(tiles.flatten(0, 2)).unflatten(0, tiles.shape[:3])
        return y.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def _attended(self, x: Tensor) -> Tensor:
        """A map (B, dim, H, W) whose cells all see each other."""
        q, k, v = self.qkv(tokens_of(x)).chunk(3, -1)
        fq, fk = (self.map(heads_of(y, self.width)) for y in (q, k))
        far = joined_heads(inline_attention(fq, fk, heads_of(v, self.width)))
        kernels = self.kernel(x.flatten(2).mean(2, keepdim=True))
        kernels = kernels.view(*x.shape[:2], _KERNEL, _KERNEL)
        near = convolved(map_of(v, x.shape[2], x.shape[3]), kernels)
        return map_of(self.out(far + tokens_of(near)), x.shape[2], x.shape[3])
