"""The recurrence token by token: the law that the fast forms are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.ops.scan.terms import Terms


def scan_recurrent(terms: Terms) -> tuple[Tensor, Tensor]:
    """Outputs (B, Hq, T, V) in the state's type, and the last state."""
    state, length = terms.state, terms.k.shape[2]
    b, heads, key_dim, _ = state.shape
    keep = terms.log_decay().exp()
    keep = keep[..., None, :] if terms.side == "value" else keep[..., None]
    k, v = terms.k.to(state.dtype)[..., None], terms.v.to(state.dtype)[..., None, :]
    q = (terms.q.to(state.dtype) * terms.scale).reshape(b, heads, -1, length, key_dim)
    betas: Sequence[Tensor | None] = [None] * length
    if terms.beta is not None:
        betas = terms.beta.to(state.dtype)[..., None].unbind(2)
    outs = []
    for query, key, write, kept, beta in zip(
        q.unbind(3), k.unbind(2), v.unbind(2), keep.unbind(2), betas, strict=True
    ):
        state = state * kept
        if beta is not None:
            write = beta * (write - key.mT @ state)
        state = state + key * write
        outs.append(query @ state)
    return torch.stack(outs, 3).flatten(1, 2), state
