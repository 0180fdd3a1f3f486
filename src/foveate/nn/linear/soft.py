"""Softmax-free Linear Transformers (2024, paper 251)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._linear import head_width
from foveate.nn._planar import Planar, map_of, tokens_of
from foveate.registry import Card, register

NORMALIZE = ("rows", "landmarks", "none")
INVERSE = ("exact", "newton")


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(-‖a_i - b_j‖² / 2) of a (…, n, D) and b (…, m, D): (…, n, m)."""
    squares = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    return torch.exp((a @ b.mT - squares / 2).clamp_max(0.0))


class NewtonInverse(torch.autograd.Function):
    """Inverse of positive definite matrices (…, m, m) by Newton's iteration, V <- 2V - V B V.

    From V = B / (largest row sum)², which always converges; 20 steps are enough for a condition
    number of about 250. The gradient is that of the inverse, not of the steps.
    """

    @staticmethod
    def forward(ctx: Any, b: Tensor, steps: int) -> Tensor:
        """The inverse after so many steps."""
        v = b / b.abs().sum(-1).amax(-1)[..., None, None].square()
        for _ in range(steps):
            v = 2 * v - v @ b @ v
        ctx.save_for_backward(v)
        return v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """-B⁻ᵀ G B⁻ᵀ."""
        (v,) = ctx.saved_tensors
        return -v.mT @ grads[0] @ v.mT, None


def nystrom(
    x: Tensor,
    landmarks: Tensor,
    v: Tensor,
    *,
    normalize: str = "rows",
    inverse: str = "exact",
    ridge: float = 1e-4,
    steps: int = 20,
) -> Tensor:
    """Attention with Gaussian weights between tokens, A ≈ C B⁻¹ Cᵀ, through landmarks.

    x (…, n, D) is queries and keys in one, landmarks (…, m, D), v (…, n, Dv) -> (…, n, Dv). C are
    the weights between tokens and landmarks, B those between landmarks, to which `ridge` is added
    on the diagonal. normalize "rows" is r^-1/2 A r^-1/2 with r = A 1, whose norm is bounded
    whatever n is; "landmarks" is C D B⁻¹ D Cᵀ with D = diag(B 1)^-1/2, "none" A itself.
    """
    _check(normalize, inverse)
    c, b = gaussian(x, landmarks), gaussian(landmarks, landmarks)
    b = b + ridge * torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    inner = torch.linalg.inv(b) if inverse == "exact" else NewtonInverse.apply(b, steps)
    if normalize == "landmarks":
        d = b.sum(-1).rsqrt()
        inner = d[..., :, None] * inner * d[..., None, :]
    if normalize != "rows":
        return c @ (inner @ (c.mT @ v))
    r = (c @ (inner @ c.sum(-2)[..., None])).clamp_min(1e-6).rsqrt()
    return r * (c @ (inner @ (c.mT @ (r * v))))


def _check(normalize: str, inverse: str) -> None:
    """Refuse what is no way to normalise or to invert."""
    for name, value, known in (("normalize", normalize, NORMALIZE), ("inverse", inverse, INVERSE)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@register(
    Card(
        name="soft",
        title="Softmax-free Linear Transformers",
        year=2024,
        paper=251,
        claim="a Gaussian kernel of landmarks makes attention linear, and normalised its norm is "
        "bounded",
        kind="module",
        family="linear",
        patterns=("noncausal self",),
        pretrained="scratch",
        cost="O(n·m·D + m³) time for n cells and m = n / ratio² landmarks",
        decoding="not applicable: it reads the whole map",
        confidence="high, medium for how the paper normalises",
        small={"dim": 32, "heads": 4},
    )
)
class SOFT(Planar):
    """`nystrom` attention of a map, plus a convolution of the values.

    Landmarks are a convolution of the queries over squares of `ratio` cells aside, normalised, then
    GELU; with `ratio` 1 every cell is its own, and attends without an inverse. The convolution of
    the values is of 3 × 3 cells, one kernel for a head. `normalize` and `inverse` as in `nystrom`.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        ratio: int = 2,
        normalize: str = "rows",
        inverse: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width, self.ratio = head_width(dim, heads), ops.check_block("ratio", ratio)
        _check(normalize, inverse)
        self.normalize, self.inverse = normalize, inverse
        self.q, self.v = (nn.Linear(dim, dim, bias=False, **made) for _ in range(2))
        self.pool = nn.Conv2d(self.width, self.width, ratio, ratio, bias=False, **made)
        self.norm = nn.LayerNorm(self.width, **made)
        self.local = nn.Conv2d(heads, heads, 3, padding=1, groups=heads, bias=False, **made)
        self.out = nn.Linear(dim, dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim, H, W); ValueError for sides below `ratio`."""
        self.check(x)
        rows, columns = x.shape[2], x.shape[3]
        if min(rows, columns) < self.ratio:
            raise ValueError(f"a map must be of {self.ratio} cells aside, got {rows} × {columns}")
        tokens = tokens_of(x)
        q = heads_of(self.q(tokens), self.width) * self.width**-0.25
        v = heads_of(self.v(tokens), self.width)
        marks = self.pool(q.flatten(0, 1).mT.unflatten(2, (rows, columns)))
        marks = gelu(self.norm(marks.flatten(2).mT)).unflatten(0, q.shape[:2])
        y = joined_heads(self._attended(q, marks, v)) + self._near(v, rows, columns)
        return map_of(self.out(y), rows, columns)

    def _attended(self, q: Tensor, marks: Tensor, v: Tensor) -> Tensor:
        """Heads (B, H, n, D) after attention, which an inverse wants in float32."""
        wide = torch.promote_types(q.dtype, torch.float32)
        q, marks, values = (y.to(wide) for y in (q, marks, v))
        if self.ratio == 1:
            return (gaussian(marks, marks) @ values).to(v.dtype)
        out = nystrom(q, marks, values, normalize=self.normalize, inverse=self.inverse)
        return out.to(v.dtype)

    def _near(self, v: Tensor, rows: int, columns: int) -> Tensor:
        """Values convolved head by head, (B, n, dim)."""
        maps = v.permute(0, 3, 1, 2).flatten(0, 1).unflatten(2, (rows, columns))
        near = conv2d(maps, self.local.weight, padding=1, groups=maps.shape[1]).flatten(2)
        return joined_heads(near.unflatten(0, (len(v), -1)).permute(0, 2, 3, 1))
