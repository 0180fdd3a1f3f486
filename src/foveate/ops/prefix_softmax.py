"""Running softmax averages as a recurrence: the gate that every prefix of the tokens shares."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from foveate.ops.checks import check_axis, check_floating, check_shape

_NOTHING = -1e30
"""Stands for -inf, from which sums and gradients would become NaN."""


def prefix_softmax_gate(
    s: Tensor, z0: Tensor | None = None, *, dim: int = -2
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights w and log-decays g with which a recurrence yields softmax averages of all prefixes.

    With h_t = exp(g_t) h_{t-1} + w_t v_t, h_t = Σ_{j≤t} softmax_{j≤t}(s)_j v_j. s of any shape with
    tokens along `dim`; z0, the log-sum-exp of the tokens before, is like s without `dim` (None: no
    tokens before, -inf) -> w and g like s, log-sum-exp of all tokens, in float32 (float64 for
    float64). Tokens with s = -inf (padding) get w = 0, g = 0. Raises ValueError or TypeError for
    what does not fit together.
    """
    check_floating(s=s, z0=z0)
    others = check_axis("s", s, dim)
    wide = torch.promote_types(s.dtype, torch.float32)
    scores = s.to(wide).movedim(dim, 0)
    start = scores.new_full(others, -math.inf)
    if z0 is not None:
        check_shape("z0", z0, others)
        start = z0.to(wide)
    rows = torch.cat((start[None], scores))
    empty = rows == -math.inf
    rows = rows.masked_fill(empty, _NOTHING)
    z = torch.logcumsumexp(rows, 0)
    before, seen = z[:-1], (~empty).cumsum(0) > 0
    # w + exp(g) is 1 exactly, which the exponentials of s - z and before - z are not.
    w = torch.sigmoid(rows[1:] - before).masked_fill(empty[1:], 0.0)
    g = logsigmoid(before - rows[1:]).masked_fill(empty[1:] | ~seen[:-1], 0.0)
    last = z[-1].masked_fill(~seen[-1], -math.inf)
    return w.movedim(0, dim), g.movedim(0, dim), last
