"""You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet.

2024, paper 48.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._linear import head_width
from foveate.nn._recurrent import Recurrent
from foveate.nn.linear._position_softmax import softmax_before, softmax_everywhere
from foveate.registry import Card, register


@register(
    Card(
        name="lightnet",
        title="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        year=2024,
        paper=48,
        claim="a recurrence that adds and normalises has no order: one scan serves any dimension",
        kind="module",
        family="linear",
        patterns=("noncausal self", "causal self"),
        pretrained="scratch",
        cost="O(L·D²) time, causal with a decay per key channel; rotation doubles the key channels",
        decoding="a state of heads · K · V and heads · K numbers",
        confidence="high for the attention, medium for where it rotates; its position embedding "
        "(MD-TPE) is left out",
        small={"dim": 32, "heads": 4, "rank": 8, "theta": 10_000.0},
    )
)
class LightNet(Recurrent):
    """o_t = Σ_d silu(q)_td Σ_j softmax_j(k_jd) v_j / sqrt(K), over j ≤ t or over all positions.

    The output is normalised over all channels and gated by silu of a projection of rank `rank`.
    `expand` times dim are the key channels of all heads. With `theta` queries and normalised keys
    rotate, channel by channel: (x cos, x sin). Tokens are positions in a row, or cells of a grid
    whose sides after the first are `sides`, where each axis turns its share of the channels.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        expand: float = 1.0,
        rank: int = 128,
        theta: float | None = None,
        sides: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.k_width, self.v_width = head_width(dim, heads, expand), head_width(dim, heads)
        if any(side < 1 for side in sides) or self.k_width % (len(sides) + 1):
            raise ValueError(
                f"sides must be at least 1, one less than the axes, which must divide the "
                f"{self.k_width} key channels of a head; got {sides}"
            )
        self.heads, self.theta, self.sides = heads, theta, sides
        self.q, self.k = (nn.Linear(dim, heads * self.k_width, **made) for _ in range(2))
        self.v, self.out = (nn.Linear(dim, dim, **made) for _ in range(2))
        rank = ops.check_block("rank", rank)
        self.gate = nn.Sequential(nn.Linear(dim, rank, **made), nn.Linear(rank, dim, **made))
        self.norm = nn.RMSNorm(dim, 1e-5, device=device, dtype=dtype)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The one scan."""
        q, k, v = self._heads(x)
        keys, decay, z = softmax_before(k, state.z, valid)
        at = state.pos[:, None] + torch.arange(x.shape[1], device=x.device)
        if self.theta is not None:
            q, keys, decay = self._turned(q, at), self._turned(keys, at), decay.repeat(1, 1, 1, 2)
        scale = self.k_width**-0.5
        out, s = ops.scan(
            q, keys, v, decay=decay, side="key", scale=scale, state=state.s, valid=valid
        )
        return self._read(out, x), replace(state, s=s, z=z)

    def whole(self, x: Tensor, source: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
        """All positions at once: no scan."""
        q, k, v = self._heads(x)
        keys = softmax_everywhere(k, valid)
        real = torch.ones_like(x[..., 0], dtype=torch.long) if valid is None else valid.long()
        at = (real.cumsum(1) - 1).clamp_min(0)
        if self.theta is not None:
            q, keys = self._turned(q, at), self._turned(keys, at)
        out = ops.linear_attention_global(q, keys, v, normalize=False) * self.k_width**-0.5
        return self._read(out, x)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, logits of the keys, and values, (B, H, L, ·) each."""
        q, k = (heads_of(y, self.k_width) for y in (silu(self.q(x)), self.k(x)))
        return q, k, heads_of(self.v(x), self.v_width)

    def _turned(self, x: Tensor, at: Tensor) -> Tensor:
        """(x cos, x sin) of x (B, H, L, K) at positions (B, L): twice the channels."""
        axes = len(self.sides) + 1
        share = self.k_width // axes
        spread = torch.arange(self.heads * share, device=x.device) / (self.heads * share)
        rates = float(self.theta or 1.0) ** -spread.view(self.heads, 1, share)
        cells = []
        for axis in range(axes):
            later = math.prod(self.sides[axis:])
            cell = at // later
            cells.append(cell if axis == 0 else cell % self.sides[axis - 1])
        angles = torch.cat([cell[:, None, :, None] * rates for cell in cells], -1)
        return torch.cat((x * angles.cos(), x * angles.sin()), -1).to(x.dtype)

    def _read(self, heads: Tensor, x: Tensor) -> Tensor:
        """From heads to tokens."""
        y: Tensor = self.out(self.norm(joined_heads(heads)) * silu(self.gate(x)))
        return y
