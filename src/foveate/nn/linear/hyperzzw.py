"""HyperZ⋅Z⋅W Operator Connects Slow-Fast Networks for Full Context Interaction.

2024, paper 256.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, instance_norm, silu

from foveate import ops
from foveate.nn._planar import Planar, convolved
from foveate.registry import Card, register


class SlowNet(nn.Module):
    """A kernel (channels, rows, columns) that a small network makes of coordinates in [-1, 1].

    A product of sines: h_0 = sin(W_0 c), h_{l+1} = sin(W_{l+1} c) ⊙ (A_l h_l) + a bias of each
    place; W are directions times 2π · omega · a number of a gamma distribution. With `context`
    channels, what is seen there scales every h, and there is a kernel for each row of a batch.
    """

    def __init__(
        self,
        channels: int,
        sides: tuple[int, int],
        hidden: int,
        *,
        depth: int = 2,
        omega: float = 1.0,
        context: int = 0,
        **made: Any,
    ) -> None:
        super().__init__()
        self.sides = sides
        gamma = [torch.distributions.Gamma(6 / (i + 1), 1.0) for i in range(depth + 1)]
        rates = torch.stack([2 * math.pi * omega * g.sample((hidden, 1)) for g in gamma])
        self.waves = nn.Parameter((rates * torch.randn(depth + 1, hidden, 2)).to(**made))
        self.mix = nn.ModuleList(
            nn.Linear(hidden, hidden, bias=False, **made) for _ in range(depth)
        )
        self.bias = nn.Parameter(torch.zeros(depth, *sides, hidden, **made))
        self.out = nn.Linear(hidden, channels, bias=False, **made)
        with torch.no_grad():
            self.out.weight /= math.sqrt(sides[0] * sides[1])
        self.context = None
        if context:
            inner = max(context // 4, 1)
            self.context = nn.Sequential(
                nn.Linear(context, inner, **made),
                nn.GELU(),
                nn.Linear(inner, hidden * depth, **made),
            )

    def forward(self, context: Tensor | None = None) -> Tensor:
        """The kernel (B, channels, rows, columns) of a context (B, width), B = 1 without one."""
        like = self.waves
        axes = [torch.linspace(-1, 1, n, device=like.device, dtype=like.dtype) for n in self.sides]
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        sines = (cells @ self.waves.mT[:, None]).sin()
        scales = like.new_ones(1, len(self.mix), 1, 1, 1)
        if self.context is not None and context is not None:
            scales = 1 + self.context(context).unflatten(-1, (len(self.mix), 1, 1, -1))
        h = sines[0][None]
        for layer, (mix, bias) in enumerate(zip(self.mix, self.bias, strict=True)):
            h = sines[layer + 1] * mix(h) * scales[:, layer] + bias
        y: Tensor = self.out(h)
        return y.movedim(-1, 1)


class GatedUnit(nn.Module):
    """y = W_y (gelu(norm(W_k x ⊙ W_q W_v x)) + b): channels of a cell that gate each other."""

    def __init__(self, dim: int, **made: Any) -> None:
        super().__init__()
        self.k, self.v, self.q, self.y = (
            nn.Conv2d(dim, dim, 1, bias=False, **made) for _ in range(4)
        )
        self.bias = nn.Parameter(torch.zeros(dim, 1, 1, **made))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim, H, W)."""
        y: Tensor = self.y(gelu(instance_norm(self.k(x) * self.q(self.v(x)))) + self.bias)
        return y


class GlobalMix(nn.Module):
    """G F with G = x ⊙ K and F = norm(unit(G) + unit(x)), a matrix for each channel.

    K is the kernel of a `SlowNet` as large as the map: a cell gets a row of G and a column of F.
    """

    def __init__(self, dim: int, size: int, hidden: int, **made: Any) -> None:
        super().__init__()
        self.kernel = SlowNet(dim, (size, size), hidden, **made)
        self.units = nn.ModuleList(GatedUnit(dim, **made) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, n, n) -> (B, dim, n, n)."""
        g = x * self.kernel()
        f = instance_norm(self.units[0](g) + self.units[1](x))
        return g @ f


class LocalMix(nn.Module):
    """A convolution of each channel whose kernel a `SlowNet` makes in the context of the map.

    The context is the mean of a map's cells, of each map alone: no map depends on its batch.
    """

    def __init__(self, dim: int, width: int, hidden: int, **made: Any) -> None:
        super().__init__()
        self.kernel = SlowNet(dim, (width, width), hidden, context=dim, **made)
        self.bias = nn.Parameter(torch.zeros(dim, 1, 1, **made))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim, H, W)."""
        return convolved(x, self.kernel(x.mean((2, 3)))) + self.bias


class Interaction(nn.Module):
    """x ⊙ sigmoid(K y²), once of the channels' means and once of the cells' means y."""

    def __init__(self, dim: int, size: int, hidden: int, **made: Any) -> None:
        super().__init__()
        self.channels = SlowNet(1, (dim, 1), hidden, **made)
        self.cells = SlowNet(1, (size, size), hidden, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, n, n) -> (B, dim, n, n)."""
        channels, cells = x.mean((2, 3), keepdim=True), x.mean(1, keepdim=True)
        by_channel = torch.sigmoid(self.channels().transpose(1, 2) * channels.square())
        return x * by_channel * torch.sigmoid(self.cells() * cells.square())


@register(
    Card(
        name="hyperzzw",
        title="HyperZ⋅Z⋅W Operator Connects Slow-Fast Networks for Full Context Interaction",
        year=2024,
        paper=256,
        claim="kernels that coordinates make, multiplied with activations, see the whole map",
        kind="module",
        family="linear",
        patterns=("noncausal self",),
        pretrained="scratch",
        cost="O(C·n³ + C·n²·k²) time for maps of n × n and kernels of k × k",
        decoding="not applicable: it reads the whole map",
        confidence="medium for the operators; the full network, its group standardisation and its "
        "loss between slow networks are not known in detail and not here",
        small={"dim": 32, "size": 6, "hidden": 8},
    )
)
class HyperZZW(Planar):
    """Branches side by side, brought to `dim` channels: y = gelu(norm(W [branches])).

    They are `GlobalMix`, `LocalMix` for each of `kernels` (a width), `Interaction`, and a gated
    linear unit of each cell. A map must be of `size` × `size` cells. Raises ValueError for even
    kernels and for other maps.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        hidden: int = 16,
        kernels: tuple[int, ...] = (3, 5),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.size = ops.check_block("size", size)
        ops.check_block("hidden", hidden)
        if any(width < 1 or width % 2 == 0 for width in kernels):
            raise ValueError(f"kernels must be odd widths, got {kernels}")
        self.far = GlobalMix(dim, size, hidden, **made)
        self.near = nn.ModuleList(LocalMix(dim, width, hidden, **made) for width in kernels)
        self.interaction = Interaction(dim, size, hidden, **made)
        self.gate, self.fast = (nn.Conv2d(dim, dim, 1, **made) for _ in range(2))
        self.out = nn.Conv2d((3 + len(kernels)) * dim, dim, 1, bias=False, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, size, size) -> (B, dim, size, size)."""
        self.check(x)
        if x.shape[2:] != (self.size, self.size):
            raise ValueError(
                f"x must be of {self.size} × {self.size} cells, got {x.shape[2]} × {x.shape[3]}"
            )
        glu = silu(self.gate(x)) * self.fast(x)
        branches = [self.far(x), *(local(x) for local in self.near), self.interaction(x), glu]
        return gelu(instance_norm(self.out(torch.cat(branches, 1))))
