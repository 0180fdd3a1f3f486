"""LeanAttention (2024, paper 207): equal shares of tiles end together, and merge to the truth."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch

from foveate import ops
from foveate.attention.base import Call
from foveate.attention.decode.lean import Piece, attend_run, fuse, plan
from foveate.bench.claims import Outcome

CLAIM = (
    "over sequences of 100 to 100,000 tokens, 8 workers with equal shares of tiles end sooner "
    "than with whole heads or with a fixed number of splits"
)

_LENGTHS, _HEADS, _TILE, _WORKERS, _SPLITS = (100, 1000, 5000, 20_000, 100_000), 4, 256, 8, 8
_ROUNDS = 7


def measure() -> Outcome:
    """Tiles of the busiest worker, by arithmetic; time of two threads on smaller lengths."""
    problems = [n for n in _LENGTHS for _ in range(_HEADS)]
    tiles = [-(-n // _TILE) for n in problems]
    split = [-(-t // _SPLITS) for t in tiles for _ in range(_SPLITS)]
    lean = max(
        sum(-(-(p.stop - p.start) // _TILE) for p in run) for run in plan(problems, _TILE, _WORKERS)
    )
    figures = {
        "makespan of whole heads, of equal shares": _makespan(tiles) / lean,
        f"makespan of {_SPLITS} splits, of equal shares": _makespan(split) / lean,
    }
    gap, ratio = _timed()
    figures |= {"largest difference from dense": gap, "time of whole heads, two threads": ratio}
    return Outcome(figures, min(list(figures.values())[:2]) > 1 and gap < 1e-5)


def _makespan(jobs: Sequence[int]) -> int:
    """Load of the busiest worker when jobs go, in order, to whoever is free first."""
    loads = [0] * _WORKERS
    for job in jobs:
        heapq.heappush(loads, heapq.heappop(loads) + job)
    return max(loads)


def _timed() -> tuple[float, float]:
    """Difference from dense attention; time of whole heads over that of equal shares."""
    made = torch.Generator().manual_seed(0)
    lengths, heads = [30_000, 2000, 500], 1
    shapes = ((9, 1), (heads, max(lengths)), (heads, max(lengths)))
    q, k, v = (torch.randn(len(lengths), h, n, 64, generator=made) for h, n in shapes)
    shares = plan(lengths, _TILE, 2)
    whole = [[Piece(0, 0, lengths[0])], [Piece(p, 0, lengths[p]) for p in (1, 2)]]
    call = Call()
    # OpenMP counts threads by the thread that asks: one for each worker.
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def run(runs: list[list[Piece]]) -> torch.Tensor:
            jobs = [pool.submit(attend_run, q, k, v, lengths, x, call) for x in runs]
            return fuse(q, v, [job.result() for job in jobs])[0]

        out = run(shares)
        ratios = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            run(whole)
            middle = time.perf_counter()
            run(shares)
            ratios.append((middle - start) / (time.perf_counter() - middle))
    rows = zip(range(len(lengths)), lengths, strict=True)
    dense = [ops.attend(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]) for b, n in rows]
    return float((out - torch.cat(dense)).abs().max()), median(ratios)
