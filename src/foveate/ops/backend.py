"""Which implementation of a primitive runs: the one place that decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

NAMES = ("torch", "reference")
_forced: ContextVar[str | None] = ContextVar("foveate_backend", default=None)


def current() -> str:
    """Name of the backend the next call runs on."""
    return _forced.get() or "torch"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend within a `with` block: "torch" (fast) or "reference" (slow, plainly right).

    Raises ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(NAMES)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
