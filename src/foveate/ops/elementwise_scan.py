"""First-order recurrences of single numbers, h_t = exp(g_t) h_{t-1} + x_t."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.ops.checks import check_axis, check_floating, check_shape

_SERIAL = 16
"""Steps from which on pairs of neighbours are joined first."""


def elementwise_scan(
    x: Tensor, g: Tensor, h0: Tensor | None = None, *, dim: int = -2
) -> tuple[Tensor, Tensor]:
    """The recurrence h_t = exp(g_t) h_{t-1} + x_t along `dim`, for each number by itself.

    x of any shape, log-decay g <= 0 (-inf resets) that broadcasts to it, h0 like x without `dim`
    or None for zeros -> h in x's type, and the last of it in float32 (float64 for float64).
    Memory and work are O(T). Raises ValueError or TypeError for what does not fit together.
    """
    _check(x, g, h0, dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs, keep = x.to(wide).movedim(dim, 0), g.to(wide).exp().expand(x.shape).movedim(dim, 0)
    start = inputs.new_zeros(inputs.shape[1:]) if h0 is None else h0.to(wide)
    if len(inputs) == 0:
        return x, start
    h: Tensor = _Scan.apply(inputs, keep, start)
    return h.movedim(0, dim).to(x.dtype), h[-1]


class _Scan(torch.autograd.Function):
    """The recurrence along axis 0; its gradient is the same one, run backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, start: Tensor) -> Tensor:
        h = _scan(torch.cat((x[:1] + keep[:1] * start, x[1:])), keep)
        ctx.save_for_backward(keep, start, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep, start, h = ctx.saved_tensors
        later = torch.cat((keep[1:], torch.zeros_like(keep[:1])))
        into = _Scan.apply(grads[0].flip(0), later.flip(0), torch.zeros_like(start)).flip(0)
        before = torch.cat((start[None], h[:-1]))
        return into, into * before, keep[0] * into[0]


def _scan(x: Tensor, keep: Tensor) -> Tensor:
    """h of h_t = keep_t h_{t-1} + x_t along axis 0, h_{-1} = 0."""
    if len(x) <= _SERIAL:
        steps = [x[0]]
        for t in range(1, len(x)):
            steps.append(torch.addcmul(x[t], keep[t], steps[-1]))
        return torch.stack(steps)
    # Two steps are one with the product of their decays; the states after every second step then
    # give those in between.
    pairs = len(x) // 2
    first, second = slice(0, 2 * pairs, 2), slice(1, None, 2)
    h = torch.empty_like(x)
    h[second] = _scan(torch.addcmul(x[second], keep[second], x[first]), keep[second] * keep[first])
    h[0] = x[0]
    h[2::2] = torch.addcmul(x[2::2], keep[2::2], h[1:-1:2])
    return h


def _check(x: Tensor, g: Tensor, h0: Tensor | None, dim: int) -> None:
    check_floating(x=x, g=g, h0=h0)
    others = check_axis("x", x, dim)
    sizes = zip(g.shape[::-1], x.shape[::-1], strict=False)
    if g.dim() > x.dim() or any(n not in (1, m) for n, m in sizes):
        raise ValueError(f"g must broadcast to x {tuple(x.shape)}, got {tuple(g.shape)}")
    if h0 is not None:
        check_shape("h0", h0, others)
