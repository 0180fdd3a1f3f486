"""A trial: contenders that are measured in the same rounds, and the lines they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.bench.kernels.race import Contender, Race, race, spread
from foveate.bench.store import Json

# The limits of the machine; every trial measures them beside its own contenders.
GEMM, COPY = "GEMM", "copy"


@dataclass(frozen=True)
class Rival:
    """The contender a line is set against, its seconds taken `factor` times."""

    contender: str
    factor: float = 1.0


@dataclass(frozen=True)
class Line:
    """One line to report on the contender `own`.

    flops and bytes are the useful work of a call; `rivals` by the name they are shown under;
    `goals` the least ratio over a rival, or share of a limit; `ideal` the ratio over the first
    rival that the skipped work alone would give.
    """

    name: str
    own: str
    shape: Json
    flops: float
    bytes: float
    rivals: Mapping[str, Rival] = field(default_factory=dict)
    goals: Mapping[str, float] = field(default_factory=dict)
    ideal: float | None = None


@dataclass(frozen=True)
class Cast:
    """Who runs in a trial, the lines it gives, and why some rivals do not run."""

    contenders: Mapping[str, Contender]
    lines: list[Line]
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """A cast that is made when its turn comes, for its inputs may be large."""

    bench: str
    label: str
    threads: int
    cast: Callable[[], Cast]


class Limits:
    """What the machine can do at most: a float32 matrix product, a copy of a large buffer."""

    def __init__(self, size: int, megabytes: int) -> None:
        self.matrices = torch.randn(2, size, size)
        self.product = torch.empty(size, size)
        self.source = torch.ones(megabytes << 18)
        self.target = torch.empty_like(self.source)

    @property
    def flops(self) -> float:
        """Of one matrix product."""
        return 2.0 * self.product.shape[0] ** 3

    @property
    def bytes(self) -> float:
        """Read and written by one copy."""
        return 2.0 * self.source.nbytes

    def contenders(self) -> dict[str, Contender]:
        """Both limits, to run beside others."""
        a, b = self.matrices
        return {
            GEMM: Contender(lambda: torch.mm(a, b, out=self.product)),
            COPY: Contender(lambda: self.target.copy_(self.source)),
        }


@torch.inference_mode()
def measure(trial: Trial, limits: Limits, rounds: int) -> list[Json]:
    """The lines of a trial, as plain records."""
    before = torch.get_num_threads()
    torch.set_num_threads(trial.threads)
    try:
        cast = trial.cast()
        times = race({**limits.contenders(), **cast.contenders}, rounds)
    finally:
        torch.set_num_threads(before)
    times.skipped.update(cast.skipped)
    return [_record(trial, line, times, limits) for line in cast.lines]


def _record(trial: Trial, line: Line, times: Race, limits: Limits) -> Json:
    gemm, copy = times.seconds[GEMM].values(), times.seconds[COPY].values()
    own = times.seconds[line.own].values()
    shares = {
        GEMM: spread(times.ratios(GEMM, line.own, line.flops / limits.flops)),
        COPY: spread(times.ratios(COPY, line.own, line.bytes / limits.bytes)),
    }
    rivals = {name: _rival(rival, line.own, times) for name, rival in line.rivals.items()}
    values = {name: held["median"] for name, held in shares.items()}
    values |= {name: held["ratio"]["median"] for name, held in rivals.items() if "ratio" in held}
    return {
        "trial": trial.label,
        "bench": trial.bench,
        "name": line.name,
        "shape": line.shape | {"threads": trial.threads},
        "rounds": len(own),
        "seconds": spread(own),
        "flops": line.flops,
        "bytes": line.bytes,
        "gflops": spread(line.flops / s / 1e9 for s in own),
        "gbytes": spread(line.bytes / s / 1e9 for s in own),
        "limits": {
            GEMM: spread(limits.flops / s / 1e9 for s in gemm),
            COPY: spread(limits.bytes / s / 1e9 for s in copy),
        },
        "shares": shares,
        "rivals": rivals,
        "ideal": line.ideal,
        "goals": [_goal(over, least, values) for over, least in line.goals.items()],
    }


def _rival(rival: Rival, own: str, times: Race) -> Json:
    name = rival.contender
    if name not in times.seconds:
        return {"skipped": times.skipped[name]}
    seconds = times.seconds[name].values()
    return {
        "seconds": spread(seconds),
        "rounds": len(seconds),
        "ratio": spread(times.ratios(name, own, rival.factor)),
        "compile_seconds": times.compiling.get(name),
    }


def _goal(over: str, bar: float, values: Mapping[str, float]) -> dict[str, Any]:
    """A goal with its outcome; None where the rival did not run."""
    value = values.get(over)
    return {
        "over": over,
        "bar": bar,
        "value": value,
        "met": None if value is None else value >= bar,
    }
