"""The terms of a linear recurrence, checked and brought to one form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.ops.checks import check_floating, check_shape
from foveate.ops.shapes import Shape, check_block, check_qkv
from foveate.ops.tile import default_scale

FORMS = ("chunk", "recurrent", "parallel")
SIDES = ("key", "value")
_HARD_RESET = -80.0
"""Stands for every log-decay below it, -inf among them, whose differences would be NaN."""


class Terms(NamedTuple):
    """What every form of the recurrence reads.

    q (B, Hq, T, K), k (B, Hkv, T, K), v (B, Hkv, T, V); log-decay (1|B, 1|Hkv, T, 1|K|V) on `side`
    (None where it acts on the state as a whole); beta (B, Hkv, T, 1) or None; state
    (B, Hkv, K, V) in float32 or wider, the type of all sums.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    state: Tensor
    side: str | None
    scale: float

    def padded(self, valid: Tensor | None) -> Terms:
        """The same with tokens that are not valid made to leave the state as it is."""
        if valid is None:
            return self
        absent = ~valid[:, None, :, None]
        q, k, v = (x.masked_fill(absent, 0.0) for x in (self.q, self.k, self.v))
        decay, beta = (
            None if x is None else x.masked_fill(absent, 0.0) for x in (self.decay, self.beta)
        )
        return self._replace(q=q, k=k, v=v, decay=decay, beta=beta)

    def log_decay(self) -> Tensor:
        """Finite log-decays in the type of the state; zeros (1, 1, T, 1) where nothing decays."""
        if self.decay is None:
            return self.state.new_zeros(1, 1, self.k.shape[2], 1)
        return self.decay.to(self.state.dtype).clamp(min=_HARD_RESET)


def terms_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    side: str | None,
    beta: Tensor | None,
    scale: float | None,
    state: Tensor | None,
) -> Terms:
    """Check the arguments of `scan` against each other; raises ValueError or TypeError."""
    shape = check_qkv(q, k, v)
    if shape.q_len != shape.k_len:
        raise ValueError(f"q has {shape.q_len} tokens, k has {shape.k_len}: they must match")
    check_floating(q=q, decay=decay, beta=beta, state=state)
    if side is not None and side not in SIDES:
        raise ValueError(f"side must be 'key' or 'value', got {side!r}")
    tokens = (shape.batch, shape.kv_heads, shape.k_len)
    if beta is not None:
        check_shape("beta", beta, tokens)
        beta = beta[..., None]
    if decay is None:
        side = None
    else:
        decay, side = _decay_of(decay, side, shape)
    if side == "value" and beta is not None:
        raise ValueError(
            "beta (the delta rule) mixes the key channels of a state, which a decay on the value "
            "side does not allow to do in chunks; use side='key' or one decay per token"
        )
    held = (shape.batch, shape.kv_heads, shape.dim, shape.v_dim)
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        state = torch.zeros(held, dtype=wide, device=q.device)
    check_shape("state", state, held)
    factor = default_scale(scale, shape.dim)
    return Terms(q, k, v, decay, beta, state.to(wide), side, factor)


def _decay_of(decay: Tensor, side: str | None, shape: Shape) -> tuple[Tensor, str | None]:
    """The log-decay with four axes, and the side of the state it acts on."""
    tokens = (shape.batch, shape.kv_heads, shape.k_len)
    if decay.dim() == 1:
        check_shape("decay", decay, (shape.kv_heads,))
        return decay.view(1, -1, 1, 1).expand(1, -1, shape.k_len, 1), None
    if decay.dim() == 3:
        check_shape("decay", decay, tokens)
        return decay[..., None], None
    if decay.dim() == 4 and side is None:
        raise ValueError(
            f"decay {tuple(decay.shape)} is per channel: say which channels it decays, "
            "side='key' or side='value'"
        )
    if decay.dim() != 4:
        raise ValueError(
            f"decay must be (heads,), (batch, heads, length) or (batch, heads, length, channels), "
            f"got {tuple(decay.shape)}"
        )
    check_shape("decay", decay, (*tokens, shape.dim if side == "key" else shape.v_dim))
    return decay, side


def check_form(form: str, chunk: int, terms: Terms) -> None:
    """Refuse an unknown form, a chunk that cannot be halved, and what the form does not do."""
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    if check_block("chunk", chunk) & (chunk - 1):
        raise ValueError(f"chunk must be a power of two, got {chunk}")
    if form == "parallel" and terms.side is not None:
        raise ValueError(
            "form='parallel' has one decay per token at most, got one per channel; use form='chunk'"
        )


def check_valid(valid: Tensor | None, k: Tensor) -> None:
    """`valid` must be a bool tensor (batch, length)."""
    if valid is None:
        return
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        got = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid must be a bool tensor, got {got}")
    check_shape("valid", valid, (k.shape[0], k.shape[2]))
