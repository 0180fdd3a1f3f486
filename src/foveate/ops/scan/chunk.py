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
    decay, state, outs = terms.log_decay(), terms.state, []
    for lo in range(0, length, step):
        parts = (
            None if x is None else x[:, :, lo : lo + step]
            for x in (terms.q, terms.k, terms.v, decay, terms.beta)
        )
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
        own, at = value_products((q @ k.mT).tril(), v, decay)
        states, state = _pass(state, at.whole, k.mT @ (v * at.after))
        out = own + (q @ states) * at.before
    else:
        products = token_products if side is None else key_products
        weights, at = products(q if beta is None else torch.cat((q, k), 2), k, decay)
        keys, keep = (k * at.after).mT, at.whole.mT
        if beta is None:
            states, state = _pass(state, keep, keys @ v)
        else:
            weights, own = weights.split((q.shape[2], 1), 2)
            beta = _cut(beta.to(wide), heads, chunk)
            right = beta * torch.cat((v, k * at.before), -1)
            v, known = _solve(beta * own, right).split((v.shape[-1], k.shape[-1]), -1)
            states, state = _pass(state, keep, keys @ v, keys @ known)
            v = v - known @ states
        out = weights @ v + (q * at.before) @ states
    return out.flatten(3, 4).flatten(1, 2)[:, :, :length], state


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """X of (I + system below its diagonal) X = right."""
    # Transposed, because the solver works on columns: its result is then contiguous.
    solve = torch.linalg.solve_triangular
    return solve(system.mT, right.mT, upper=True, left=False, unitriangular=True).mT


def _pass(
    state: Tensor, keep: Tensor, added: Tensor, removed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """States before each chunk and after the last, S' = keep S + added - removed S."""
    state = state[:, :, None]
    states = []
    for n in range(added.shape[3]):
        states.append(state)
        after = torch.addcmul(added[:, :, :, n], keep[:, :, :, n], state)
        state = after if removed is None else after - removed[:, :, :, n] @ state
    return torch.stack(states, 3), state[:, :, 0]


def _cut(x: Tensor, heads: int, chunk: int) -> Tensor:
    """(B, heads·G, T, D) -> (B, heads, G, chunks, chunk, D), zeros after the last token."""
    x = pad(x, (0, 0, 0, -x.shape[2] % chunk))
    return x.reshape(x.shape[0], heads, -1, x.shape[2] // chunk, chunk, x.shape[3])
