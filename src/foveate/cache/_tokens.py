"""Keys and values of consecutive tokens, held together."""

from __future__ import annotations

import torch
from torch import Tensor

Tokens = tuple[Tensor, Tensor]
"""Keys and values (1, Hkv, n, ·), or what stands for them."""


def joined(*parts: Tokens) -> Tokens:
    """Consecutive tokens as one."""
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)


def cut(x: Tokens, start: int, stop: int | None = None) -> Tokens:
    """The tokens start … stop."""
    return x[0][:, :, start:stop], x[1][:, :, start:stop]


def owned(x: Tokens) -> Tokens:
    """Copies: a view would hold on to all that it was cut from."""
    k, v = (t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for t in x)
    return k, v
