"""Lightning Attention-2 (2024, paper 22): tokens a second against length."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from foveate.bench.claims import Outcome
from foveate.registry import create

CLAIM = "in blocks the speed of training does not depend on length, that of softmax attention does"

_DIM, _HEADS, _ROUNDS = 128, 2, 5
_LENGTHS = {"lightning2": (2048, 8192, 32_768), "softmax_attention": (2048, 8192)}


def measure() -> Outcome:
    """Thousand tokens a second, forward and backward, of one layer of 128 channels."""
    figures = {}
    speeds = {}
    for name, lengths in _LENGTHS.items():
        speeds[name] = _speeds([_pass(name, length) for length in lengths], lengths)
        for length, speed in zip(lengths, speeds[name], strict=True):
            figures[f"thousand tokens/s at {length:,}, {name}"] = speed / 1e3
    lightning, softmax = speeds.values()
    steady = min(lightning) > 0.8 * max(lightning)
    return Outcome(figures, steady and softmax[1] < 0.8 * softmax[0])


def _pass(name: str, length: int) -> Callable[[], object]:
    """A training pass over one row."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = create(name, dim=_DIM, heads=_HEADS)
    x = torch.randn(1, length, _DIM, generator=torch.Generator().manual_seed(0))
    return lambda: layer(x).sum().backward()


def _speeds(passes: list[Callable[[], object]], lengths: tuple[int, ...]) -> list[float]:
    """Median tokens a second of each, in rounds of all, so that a busy machine slows all alike."""
    for run in passes:
        run()
    seconds: list[list[float]] = [[] for _ in passes]
    for _ in range(_ROUNDS):
        for kept, run in zip(seconds, passes, strict=True):
            start = time.perf_counter()
            run()
            kept.append(time.perf_counter() - start)
    return [length / median(kept) for length, kept in zip(lengths, seconds, strict=True)]
