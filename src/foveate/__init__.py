"""foveate: every attention mechanism of the literature behind a few shared primitives.

foveate.find(kind="attention")                       # cards of what there is
attn = foveate.create("flexprefill", gamma=0.95)     # callable on q, k, v
with foveate.attach(model, prefill="flexprefill"):   # inside a transformers model
    model.generate(...)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foveate.ops.backend import backend
from foveate.ops.grids import disc, neighborhood, radial, strided
from foveate.ops.mask import Mask, causal, dense, documents, groups, padding, sinks, window
from foveate.registry import Card, create, find, register

if TYPE_CHECKING:
    from foveate.hf.attach import attach
    from foveate.hf.prefix import prefix

__version__ = "0.1.0"

__all__ = [
    "Card",
    "Mask",
    "__version__",
    "attach",
    "backend",
    "causal",
    "create",
    "dense",
    "disc",
    "documents",
    "find",
    "groups",
    "neighborhood",
    "padding",
    "prefix",
    "radial",
    "register",
    "sinks",
    "strided",
    "window",
]


def __getattr__(name: str) -> Any:
    """`attach` and `prefix` need transformers: they are imported on first use."""
    if name == "attach":
        from foveate.hf.attach import attach

        return attach
    if name == "prefix":
        from foveate.hf.prefix import prefix

        return prefix
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")
