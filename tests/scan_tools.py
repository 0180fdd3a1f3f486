"""What the tests of linear recurrences share: terms of every variant, and the token loop."""

import torch
from torch.nn.functional import logsigmoid, normalize

from foveate import ops

VARIANTS = {
    "no decay": (None, False),
    "per head": ("head", False),
    "per token": ("token", False),
    "per key channel": ("key", False),
    "per value channel": ("value", False),
    "delta": (None, True),
    "delta, per head": ("head", True),
    "gated delta": ("token", True),
    "delta, per key channel": ("key", True),
}
"""Kind of decay, and whether writing follows the delta rule."""


def scan_terms(
    variant, length, *, batch=2, q_heads=4, kv_heads=2, dim=16, v_dim=24, dtype=torch.float32
):
    """Random (q, k, v) and options of a variant with a state, the same on every call."""
    kind, delta = VARIANTS[variant]
    make = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    tokens = (batch, kv_heads, length)
    q, v = draw(batch, q_heads, length, dim), draw(*tokens, v_dim)
    k = normalize(draw(*tokens, dim), dim=-1)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"state": draw(batch, kv_heads, dim, v_dim).to(wide)}
    shapes = {
        "head": (kv_heads,),
        "token": tokens,
        "key": (*tokens, dim),
        "value": (*tokens, v_dim),
    }
    if kind is not None:
        options["decay"] = logsigmoid(draw(*shapes[kind])).to(wide)
    if kind in ("key", "value"):
        options["side"] = kind
    if delta:
        options["beta"] = (2 * torch.sigmoid(2 * draw(*tokens))).to(wide)
    return (q, k, v), options


def law(q, k, v, **options):
    """The token loop in float64."""
    options = {
        name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in options.items()
    }
    return ops.scan(q.double(), k.double(), v.double(), **options, form="recurrent")
