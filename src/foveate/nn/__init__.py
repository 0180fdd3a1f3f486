"""Trainable layers: mechanisms of kind "module", and the models that are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.nn._transformer import Transformer

__all__ = ["Transformer"]


def __getattr__(name: str) -> Any:
    """`Transformer` is imported on first use: its layers are not needed for one mechanism."""
    if name == "Transformer":
        from foveate.nn._transformer import Transformer

        return Transformer
    raise AttributeError(f"module 'foveate.nn' has no attribute {name!r}")
