"""A memory whose weights are learned while it reads: gradient steps with momentum and forgetting.

The memory is an MLP M without biases: one matrix, or several with SiLU between them and the input
added to the output. Token t writes v_t under k_t by the gradient of |M(k_t) - v_t|² at W̄, the
weights at the start of its chunk:

    P_t = η_t P_{t-1} - θ_t ∇_t        W_t = (1 - α_t) W_{t-1} + P_t

∇_t of a matrix is h_t e_tᵀ, what goes into it and the error that comes back to its output, so no
gradient of a single token is ever formed: within a stretch of a chunk with weights W and momentum
P before it,

    W_i = a_i W + c_i P - Σ_{j≤i} G_ij θ_j h_j e_jᵀ,    G = A E,  c = A b

where A and E are the products of 1 - α and of η from one token to another, a and b those from the
start. A read with W_i is then attention with weights G_ij θ_j h_j·x_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from foveate.ops.checks import check_floating, check_shape
from foveate.ops.shapes import check_block

_READS = ("lag", "token")
_NEVER = -80.0
"""Stands for every log below it, -inf among them, whose differences would be NaN."""


class MemoryState(NamedTuple):
    """A memory in the middle of a row: matrices (B, H, n, m) in float32 or wider.

    base are the weights at the start of the chunk, now those of the last token, momentum what the
    next step goes on with, seen the tokens of each row (B,).
    """

    base: tuple[Tensor, ...]
    now: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    seen: Tensor

    def open(self, chunk: int) -> tuple[Tensor, ...]:
        """The weights at the start of the next token's chunk."""
        new = (self.seen % chunk == 0)[:, None, None, None]
        return tuple(torch.where(new, w, b) for w, b in zip(self.now, self.base, strict=True))


def memory_start(weights: Sequence[Tensor], batch: int) -> MemoryState:
    """The state before any token: weights (H, n, m) for every row, no momentum."""
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    now = tuple(w.to(wide).expand(batch, *w.shape) for w in weights)
    seen = torch.zeros(batch, dtype=torch.long, device=weights[0].device)
    return MemoryState(now, now, tuple(torch.zeros_like(w) for w in now), seen)


def memory_read(q: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """M(q) of weights (B, H, n, m) each: q (B, H, T, K) -> (B, H, T, V) in q's type."""
    x = q.to(weights[0].dtype)
    for i, w in enumerate(weights):
        x = (x if i == 0 else silu(x)) @ w
    return (x + q if len(weights) > 1 else x).to(q.dtype)


def stretches(seen: Tensor, length: int, chunk: int) -> list[tuple[int, int]]:
    """Stretches of tokens within which no row begins a chunk."""
    offsets = {-n % chunk for n in seen.tolist()}
    cuts = [t for t in range(1, length) if t % chunk in offsets]
    return list(zip([0, *cuts], [*cuts, length], strict=True))


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MemoryState,
    *,
    rate: Tensor,
    log_momentum: Tensor | None = None,
    log_keep: Tensor | None = None,
    chunk: int = 16,
    read: Literal["lag", "token"] = "lag",
    valid: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write v under k and read at q: q, k (B, H, T, K), v (B, H, T, V) -> (B, H, T, V), state.

    `rate` θ >= 0 and the logs of η (None: no momentum) and of 1 - α (None: nothing is forgotten)
    are (B, H, T). `read` "lag" reads the weights at the start of the token's chunk, "token" those
    after it. Chunks of `chunk` tokens are counted from a row's first. Tokens outside of `valid`
    (B, T) bool, which must come last in a row, write nothing. A memory of several matrices needs
    V = K. Raises ValueError or TypeError for what does not fit together.
    """
    _check(q, k, v, state, rate, log_momentum, log_keep, chunk, read, valid)
    wide, length = state.now[0].dtype, q.shape[2]
    real = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
    nothing = torch.zeros_like(rate)
    momentum = nothing + _NEVER if log_momentum is None else log_momentum
    keep = nothing if log_keep is None else log_keep
    absent = ~real[:, None]
    rate = rate.to(wide).masked_fill(absent, 0.0)
    momentum, keep = (x.to(wide).masked_fill(absent, 0.0) for x in (momentum, keep))
    outs = []
    for start, end in stretches(state.seen, length, chunk):
        part = slice(start, end)
        tokens = [x[:, :, part].to(wide) for x in (q, k, v)]
        gates = [x[:, :, part] for x in (rate, momentum, keep)]
        out, state = _stretch(tokens, gates, real[:, part], state, chunk, read == "token")
        outs.append(out)
    return torch.cat(outs, 2).to(q.dtype), state


def _stretch(
    tokens: list[Tensor],
    gates: list[Tensor],
    real: Tensor,
    state: MemoryState,
    chunk: int,
    exact: bool,
) -> tuple[Tensor, MemoryState]:
    """Some tokens of one chunk, in every row."""
    (q, k, v), (rate, momentum, keep) = tokens, gates
    # Only a token that is there begins a chunk.
    opened = state.open(chunk)
    first = real[:, :1, None, None]
    base = tuple(torch.where(first, w, b) for w, b in zip(opened, state.base, strict=True))
    inputs, errors = _gradients(k, v, base)
    still, moved = _products(keep), _products(momentum)
    # Padding takes no step, not even that of the momentum.
    moved = moved * real[:, None, :, None]
    gain = still @ moved
    kept = keep.cumsum(2).exp()
    pushed = still @ (momentum.cumsum(2).exp() * real[:, None])[..., None]
    weight = gain * rate[:, :, None]
    old = tuple(zip(state.now, state.momentum, inputs, errors, strict=True))
    now = tuple(
        kept[:, :, -1:, None] * w + pushed[:, :, -1:] * p - (h * weight[:, :, -1, :, None]).mT @ e
        for w, p, h, e in old
    )
    last = _products(momentum)[:, :, -1] * rate
    push = momentum.sum(2).exp()[..., None, None]
    after = tuple(push * p - (h * last[..., None]).mT @ e for _, p, h, e in old)
    if not exact:
        out = memory_read(q, base)
    else:
        x = q
        for i, (w, p, h, e) in enumerate(old):
            x = x if i == 0 else silu(x)
            x = kept[..., None] * (x @ w) + pushed * (x @ p) - ((x @ h.mT) * weight) @ e
        out = x + q if len(old) > 1 else x
    return out, MemoryState(base, now, after, state.seen + real.sum(1))


def _gradients(
    k: Tensor, v: Tensor, weights: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Of every matrix: what goes into it and the error at its output, (B, H, T, n | m)."""
    inputs, sums = [k], []
    for i, w in enumerate(weights):
        sums.append(inputs[-1] @ w)
        if i < len(weights) - 1:
            inputs.append(silu(sums[-1]))
    said = sums[-1] + k if len(weights) > 1 else sums[-1]
    errors = [2 * (said - v)]
    for w, x in zip(reversed(weights[1:]), reversed(sums[:-1]), strict=True):
        gate = torch.sigmoid(x)
        errors.insert(0, (errors[0] @ w.mT) * gate * (1 + x * (1 - gate)))
    return inputs, errors


def _products(logs: Tensor) -> Tensor:
    """Products over the tokens after j up to i: logs (B, H, T) -> (B, H, T, T), 0 for j > i."""
    # Differences of a long float32 sum would lose digits.
    sums = logs.double().clamp(min=_NEVER).cumsum(2)
    between = (sums[..., None] - sums[:, :, None]).to(logs.dtype)
    above = torch.ones(between.shape[-2:], dtype=torch.bool, device=logs.device).triu(1)
    return between.masked_fill(above, -torch.inf).exp()


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MemoryState,
    rate: Tensor,
    log_momentum: Tensor | None,
    log_keep: Tensor | None,
    chunk: int,
    read: str,
    valid: Tensor | None,
) -> None:
    check_block("chunk", chunk)
    if read not in _READS:
        raise ValueError(f"read must be one of {', '.join(_READS)}, got {read!r}")
    check_floating(q=q, k=k, v=v, rate=rate, log_momentum=log_momentum, log_keep=log_keep)
    if q.dim() != 4 or q.shape[2] == 0:
        raise ValueError(f"q must be (batch, heads, length >= 1, channels), got {tuple(q.shape)}")
    batch, heads, length, width = q.shape
    check_shape("k", k, (batch, heads, length, width))
    check_shape("v", v, (*k.shape[:3], v.shape[-1]))
    for name, x in (("rate", rate), ("log_momentum", log_momentum), ("log_keep", log_keep)):
        if x is not None:
            check_shape(name, x, (batch, heads, length))
    if valid is not None:
        check_shape("valid", valid, (batch, length))
    for i, w in enumerate(state.now):
        out = v.shape[-1] if i == len(state.now) - 1 else w.shape[-1]
        check_shape(f"matrix {i} of the memory", w, (batch, heads, width, out))
        width = out
    if len(state.now) > 1 and width != q.shape[-1]:
        raise ValueError(
            f"a memory of several matrices adds its input to its output: v must have "
            f"{q.shape[-1]} channels as k, got {width}"
        )
