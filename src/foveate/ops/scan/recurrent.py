"""The recurrence token by token: the law that the fast forms are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.scan.terms import Terms


def scan_recurrent(terms: Terms) -> tuple[Tensor, Tensor]:
    """Outputs (B, Hq, T, V) in the state's type, and the last state."""
    state = terms.state
    b, heads, key_dim, _ = state.shape
    length = terms.k.shape[2]
    keep = terms.log_decay().exp()
    keep = keep[..., None, :] if terms.side == "value" else keep[..., None]
    q, k, v = (x.to(state.dtype) for x in (terms.q, terms.k, terms.v))
    q = (q * terms.scale).reshape(b, heads, -1, length, key_dim)
    outs = []
    for t in range(length):
        state = state * keep[:, :, t]
        key, write = k[:, :, t, :, None], v[:, :, t, None]
        if terms.beta is not None:
            write = terms.beta[:, :, t, None].to(state.dtype) * (write - key.mT @ state)
        state = state + key * write
        outs.append(q[:, :, :, t] @ state)
    return torch.stack(outs, 3).flatten(1, 2), state
