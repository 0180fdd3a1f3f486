"""Timing many contenders in turn, round by round, and setting one against another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

# Seconds a contender may take in all: one that needs more runs fewer rounds, at least one.
_BUDGET = 3.0


@dataclass(frozen=True)
class Contender:
    """Something to time: `run` makes `calls` calls; `compiles` says that the first one compiles."""

    run: Callable[[], Any]
    calls: int = 1
    compiles: bool = False


@dataclass
class Race:
    """Seconds of a call by contender and round, seconds of compiling, why one did not run."""

    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    compiling: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def ratios(self, rival: str, own: str, factor: float = 1.0) -> list[float]:
        """factor · rival / own of every round that both ran; of all pairs where they share none."""
        a, b = self.seconds[rival], self.seconds[own]
        shared = [(a[i], b[i]) for i in a if i in b]
        pairs = shared or [(x, y) for x in a.values() for y in b.values()]
        return [factor * x / y for x, y in pairs]


def race(contenders: Mapping[str, Contender], rounds: int) -> Race:
    """Run everyone once to warm up, then `rounds` times in turn, in alternating order.

    The first round counts only for those who are too slow for a second one.
    """
    result = Race()
    names = [name for name, who in contenders.items() if _ready(name, who, result)]
    for index in range(rounds + 1):
        for name in names if index % 2 == 0 else names[::-1]:
            held = result.seconds.setdefault(name, {})
            if sum(held.values()) * contenders[name].calls < _BUDGET:
                held[index] = _seconds(contenders[name])
    for held in result.seconds.values():
        if len(held) > 1:
            del held[0]
    for name, seconds in result.compiling.items():
        result.compiling[name] = max(0.0, seconds - median(result.seconds[name].values()))
    return result


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest of some values."""
    held: Sequence[float] = list(values)
    return {"median": median(held), "min": min(held), "max": max(held)}


def _ready(name: str, contender: Contender, result: Race) -> bool:
    """Whether a contender can run; one that compiles does so here, on the clock."""
    if contender.compiles:
        from torch._inductor.utils import fresh_inductor_cache

        try:
            with fresh_inductor_cache():  # what an earlier run compiled would be found
                result.compiling[name] = _seconds(contender)
        except Exception as error:  # a compiler fails in many ways; the reason is reported
            lines = str(error).strip().splitlines() or [type(error).__name__]
            result.skipped[name] = f"did not compile: {lines[0][:120]}"
            return False
    return True


def _seconds(contender: Contender) -> float:
    start = time.perf_counter()
    contender.run()
    return (time.perf_counter() - start) / contender.calls
