"""`scan`: checks, chooses the form and the backend, and calls it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from foveate.native.scan import scan as scan_kernel
from foveate.ops.backend import current, native_for
from foveate.ops.scan.chunk import scan_chunk
from foveate.ops.scan.recurrent import scan_recurrent
from foveate.ops.scan.terms import Terms, check_form, check_valid, terms_of

_CHANNELS = 256
"""Key or value channels of a head up to which the kernel keeps a state near the processor."""


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    side: Literal["key", "value"] | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    valid: Tensor | None = None,
    chunk: int = 64,
    form: Literal["chunk", "recurrent", "parallel"] = "chunk",
) -> tuple[Tensor, Tensor]:
    """Linear recurrence S_t = a_t S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t, in linear time.

    q (B, Hq, T, K), k (B, Hkv, T, K), v (B, Hkv, T, V), state before the first token
    (B, Hkv, K, V) or None for zeros -> out (B, Hq, T, V) in q's type, last state in float32
    (float64 for float64). Token t reads what it wrote itself; scale defaults to 1/sqrt(K).

    `decay` is log a <= 0: per head (Hkv,), per token (B, Hkv, T), or per channel (B, Hkv, T, K|V)
    with the `side` of the state whose channels it decays; below -80, -inf too, it is a reset.
    `beta` (B, Hkv, T) turns writing into the delta rule, S_t = (I - β_t k_t k_tᵀ) a_t S_{t-1} +
    β_t k_t v_tᵀ, for every decay but one on the value side. Tokens outside of `valid` (B, T) bool
    leave the state as it is and give 0.

    `form` "chunk" works on `chunk` tokens at a time (a power of two), "recurrent" on one and is
    what the others are held to, "parallel" on all (T×T in memory, no decay per channel).
    Raises ValueError or TypeError for what does not fit together.
    """
    terms = terms_of(q, k, v, decay, side, beta, scale, state)
    check_form(form, chunk, terms)
    check_valid(valid, k)
    length = k.shape[2]
    if length == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), terms.state
    if form == "chunk" and (done := _native(terms, valid)) is not None:
        return done
    terms = terms.padded(valid)
    if form == "recurrent" or current() == "reference":
        out, last = scan_recurrent(terms)
    elif form == "parallel":
        out, last = scan_chunk(terms, length)
    else:
        out, last = scan_chunk(terms, min(chunk, 1 << (length - 1).bit_length()))
    if valid is not None:  # zero queries would still read a NaN in the state
        out = out.masked_fill(~valid[:, None, :, None], 0.0)
    return out.to(q.dtype), last


def _native(terms: Terms, valid: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The result of the CPU kernel, or None where it cannot serve the call."""
    q, k, v, decay, beta, state, side, scale = terms
    found = native_for(q, k, v, decay, beta, state)
    if found is None or any(x.shape[3] % 8 or x.shape[3] > _CHANNELS for x in (k, v)):
        return None
    return scan_kernel(
        found,
        q,
        k,
        v,
        state,
        decay=None if decay is None else decay.float().expand(*k.shape[:3], -1),
        side=side,
        beta=None if beta is None else beta.float(),
        valid=valid,
        scale=scale,
    )
