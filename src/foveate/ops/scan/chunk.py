"""The recurrence in chunks of tokens: matrix products inside a chunk, one state between chunks.

Within a chunk with the state S before it, b the running sum of the log-decays,
G_ij = exp(b_i - b_j) and u the values written:

    o = (q exp(b)) S + tril(q kᵀ G) u          S' = exp(b_C) S + (k exp(b_C - b))ᵀ u

u is v, or under the delta rule the solution of (I + β tril(k kᵀ G, -1)) u = β (v - (k exp(b)) S).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.ops.scan.decay import key_products, token_products, value_products
from foveate.ops.scan.terms import Terms
from foveate.ops.tile import recomputed

_SLAB = 1 << 18
"""Numbers of one tensor of the chunks that are worked on at once."""


def scan_chunk(terms: Terms, chunk: int) -> tuple[Tensor, Tensor]:
    """Outputs (B, Hq, T, V) in the state's type, and the last state; memory O(T)."""
    b, heads, length, key_dim = terms.q.shape
    per_chunk = b * heads * chunk * max(key_dim, terms.v.shape[3], chunk)
    step = chunk * max(1, _SLAB // per_chunk)
    state, outs = terms.state, []
    # Split, not sliced: the gradient of every slice would be as long as the whole.
    inputs = (terms.q, terms.k, terms.v, terms.log_decay(), terms.beta)
    slabs = ([None] * -(-length // step) if x is None else x.split(step, 2) for x in inputs)
    for parts in zip(*slabs, strict=True):
        out, state = recomputed(_slab, *parts, state, terms.side, terms.scale, chunk)
        outs.append(out)
    return torch.cat(outs, 2), state


def _slab(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    state: Tensor,
    side: str | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Some chunks: what does not depend on the state for all of them at once."""
    heads, length, wide = k.shape[1], k.shape[2], state.dtype
    q = _cut(q.to(wide) * scale, heads, chunk)
    k, v = (_cut(x.to(wide), heads, chunk) for x in (k, v))
    decay = _cut(decay, decay.shape[1], chunk)
    if side == "value":
        own, at = value_products((q @ k.mT).tril_(), v, decay)
        states, state = _pass(state, at.whole, k.mT @ (v * at.after))
    else:
        products = token_products if side is None else key_products
        if beta is None:
            (weights,), at = products((q,), k, decay)
            states, state = _pass(state, at.whole.mT, (k * at.after).mT @ v)
        else:
            beta = _cut(beta.to(wide), heads, chunk)
            (weights, system), at = products((q, k * beta), k, decay)
            right = v * beta, k * (at.before * beta)
            written, known = (_solve(system, x) for x in right)
            states, v, state = _delta_pass(state, at.whole.mT, k * at.after, written, known)
        own = weights @ v
    if side == "key":
        out = own + (q * at.before) @ states
    else:
        out = torch.addcmul(own, q @ states, at.before)
    return out.flatten(3, 4).flatten(1, 2)[:, :, :length], state


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """X of (I + system below its diagonal) X = right."""
    # Transposed, because the solver works on columns: its result is then contiguous.
    solve = torch.linalg.solve_triangular
    return solve(system.mT, right.mT, upper=True, left=False, unitriangular=True).mT


def _pass(state: Tensor, keep: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk and after the last, S' = keep S + added."""
    state, states = state[:, :, None], []
    for kept, new in zip(keep.unbind(3), added.unbind(3), strict=True):
        states.append(state)
        state = torch.addcmul(new, kept, state)
    return torch.stack(states, 3), state[:, :, 0]


def _delta_pass(
    state: Tensor, keep: Tensor, keys: Tensor, written: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """States before each chunk, values u = written - known S, state S' = keep S + keysᵀ u."""
    state, states, values = state[:, :, None], [], []
    chunks = (x.unbind(3) for x in (keep, keys, written, known))
    for kept, key, value, old in zip(*chunks, strict=True):
        states.append(state)
        values.append(value - old @ state)
        state = torch.addcmul(key.mT @ values[-1], kept, state)
    return torch.stack(states, 3), torch.stack(values, 3), state[:, :, 0]


def _cut(x: Tensor, heads: int, chunk: int) -> Tensor:
    """(B, heads·G, T, D) -> (B, heads, G, chunks, chunk, D), zeros after the last token."""
    x = pad(x, (0, 0, 0, -x.shape[2] % chunk))
    return x.reshape(x.shape[0], heads, -1, x.shape[2] // chunk, chunk, x.shape[3])
