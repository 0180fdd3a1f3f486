"""Parts of linear recurrent layers: short convolution, the way out, and linear attention itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._recurrent import Recurrent

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "sigmoid": torch.sigmoid}


class ShortConv(nn.Module):
    """Depthwise causal convolution over the last `width` tokens, then SiLU where `activation`."""

    def __init__(
        self,
        channels: int,
        width: int = 4,
        *,
        activation: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, ops.check_block("width", width), **made))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)
        self.bias = nn.Parameter(torch.zeros(channels, **made)) if bias else None

    def forward(
        self, x: Tensor, valid: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, channels) -> y alike and the last inputs, as `ops.short_conv`."""
        y, last = ops.short_conv(x, self.weight, self.bias, state=state, valid=valid)
        return silu(y) if self.activation else y, last


class Readout(nn.Module):
    """From heads back to tokens: RMS norm of each head, a gate made from the input, a projection.

    gate "silu", "sigmoid" or None for none; the norm's weights are shared by the heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int,
        *,
        gate: str | None = "silu",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kind = gate
        self.norm = nn.RMSNorm(width, eps, **made)
        self.gate = None if gate is None else nn.Linear(dim, heads * width, bias=False, **made)
        self.out = nn.Linear(heads * width, dim, bias=False, **made)

    def forward(self, heads: Tensor, x: Tensor) -> Tensor:
        """Heads (B, H, L, width) and the layer's input x (B, L, dim) -> (B, L, dim)."""
        y = joined_heads(self.norm(heads))
        if self.gate is not None and self.kind is not None:
            y = y * GATES[self.kind](self.gate(x))
        out: Tensor = self.out(y)
        return out


class JointReadout(Readout):
    """A `Readout` with one norm over the `width` channels of all heads together."""

    def __init__(self, dim: int, width: int, **options: Any) -> None:
        super().__init__(dim, 1, width, **options)

    def forward(self, heads: Tensor, x: Tensor) -> Tensor:
        """Heads (B, H, L, width / H) and the layer's input x (B, L, dim) -> (B, L, dim)."""
        return super().forward(joined_heads(heads)[:, None], x)


def head_width(dim: int, heads: int, share: float = 1.0) -> int:
    """Width of a head when all of them together have the share `share` of `dim`.

    Raises ValueError when that is no whole number of channels.
    """
    ops.check_block("heads", heads)
    width = dim * share / heads
    if width < 1 or width != int(width):
        raise ValueError(
            f"dim {dim} times {share:g} must be a multiple of heads, got {heads} heads"
        )
    return int(width)


def queries_last(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, Lq, ·) as the last queries of a recurrence over k (B, H, Lk, ·), zeros before them.

    Raises ValueError for more queries than keys.
    """
    before = k.shape[2] - q.shape[2]
    if before < 0:
        raise ValueError("in causal cross-attention x must not be longer than its context")
    return pad(q, (0, 0, before, 0))


class LinearAttention(Recurrent):
    """Attention with weights φ(q)·φ(k): a subclass says what φ is in `features`.

    Weights are divided by their sum over the keys + eps where `normalize`.
    """

    normalize = True
    eps = 1e-6

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qk_width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        width = head_width(dim, heads)
        qk_width = width if qk_width is None else ops.check_block("qk_width", qk_width)
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.qk_width, self.v_width = qk_width, width
        self.q, self.k = (nn.Linear(dim, heads * qk_width, **made) for _ in range(2))
        self.v = nn.Linear(dim, heads * width, **made)
        self.out = nn.Linear(heads * width, dim, **made)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ of queries and keys (B, H, L, qk_width) -> (B, H, L, F)."""
        raise NotImplementedError

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Attention to what came before, as a recurrence."""
        fq, fk, v = self._terms(x, x)
        held = None if state.s is None else (state.s, state.z)
        out, (s, z) = ops.linear_attention_causal(
            fq, fk, v, state=held, valid=valid, normalize=self.normalize, eps=self.eps
        )
        return self.out(joined_heads(out)), replace(state, s=s, z=z)

    def whole(self, x: Tensor, source: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
        """Attention to a source, all of it or up to the queries' positions."""
        fq, fk, v = self._terms(x, source)
        if causal:
            out, _ = ops.linear_attention_causal(
                queries_last(fq, fk), fk, v, valid=valid, normalize=self.normalize, eps=self.eps
            )
            out = out[:, :, -fq.shape[2] :]
        else:
            weight = None if valid is None else valid[:, None].expand(fk.shape[:3]).to(fk.dtype)
            out = ops.linear_attention_global(fq, fk, v, weight, self.normalize, self.eps)
        y: Tensor = self.out(joined_heads(out))
        return y

    def _terms(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys, and values."""
        q, k = (heads_of(y, self.qk_width) for y in (self.q(x), self.k(source)))
        return *self.features(q, k), heads_of(self.v(source), self.v_width)


def decay_rates(count: int, low: float, high: float, **made: Any) -> nn.Parameter:
    """Logarithms of rates drawn evenly from [low, high], those of a decay exp(-rate · step)."""
    rates = torch.empty(count, **made).uniform_(max(low, 1e-4), high)
    return nn.Parameter(rates.log())


def step_bias(count: int, low: float = 1e-3, high: float = 0.1, **made: Any) -> nn.Parameter:
    """Biases b with softplus(b) drawn from [low, high], evenly in the logarithm."""
    bounds = math.log(low), math.log(high)
    steps = torch.empty(count, **made).uniform_(*bounds).exp()
    return nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
