"""Which implementation of a primitive runs: the one place that decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from foveate.native import HOW_TO_GET, Kernels, kernels

NAMES = ("native", "torch", "reference")
_forced: ContextVar[str | None] = ContextVar("foveate_backend", default=None)


def current() -> str:
    """Name of the backend the next call prefers; what "native" cannot serve runs on "torch"."""
    return _forced.get() or "native"


def native_for(*tensors: Tensor | None) -> Kernels | None:
    """The CPU kernels if they may serve a call on these tensors, else None.

    They serve float32 and bfloat16 tensors on the CPU whose last axis is contiguous, forward only.
    """
    if current() != "native":
        return None
    wanted = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            return None
        if (wanted and x.requires_grad) or (x.shape[-1] > 1 and x.stride(-1) != 1):
            return None
    return kernels()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend within a `with` block.

    "native" (CPU kernels, the default where they are built), "torch", or "reference" (slow, plainly
    right). Raises ValueError for an unknown name, RuntimeError for "native" without kernels.
    """
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(NAMES)}")
    if name == "native" and kernels() is None:
        raise RuntimeError(f"there are no CPU kernels in this installation; {HOW_TO_GET}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
