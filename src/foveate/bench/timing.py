"""Timing two functions against each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any


def paired(a: Callable[[], Any], b: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median seconds of a and of b and the median ratio a / b over interleaved rounds."""
    a(), b()
    times = []
    for index in range(rounds):
        first, second = (a, b) if index % 2 == 0 else (b, a)
        one, two = _seconds(first), _seconds(second)
        times.append((one, two) if index % 2 == 0 else (two, one))
    return (
        median(x for x, _ in times),
        median(y for _, y in times),
        median(x / y for x, y in times),
    )


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
