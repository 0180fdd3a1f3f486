"""LeanAttention: equal shares of all key tiles for every worker (2024, paper 207)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Attention, Call, Result, attend_span, dense_result
from foveate.registry import Card, register


class Piece(NamedTuple):
    """Keys start … stop - 1 of a problem: of one batch row and kv head."""

    problem: int
    start: int
    stop: int


Partials = list[tuple[int, tuple[Tensor, Tensor]]]


def plan(lengths: Sequence[int], tile: int, workers: int) -> list[list[Piece]]:
    """For each worker the pieces it attends to: a run of the tiles of all problems in their order.

    lengths are the numbers of keys of the problems; a problem of n keys has ceil(n / tile) tiles.
    Workers get equally many tiles, or one more.
    """
    ops.check_block("tile", tile)
    ops.check_block("workers", workers)
    if any(n < 0 for n in lengths):
        raise ValueError(f"lengths must be at least 0, got {list(lengths)}")
    tiles = [-(-n // tile) for n in lengths]
    firsts = [0, *accumulate(tiles)]
    runs = []
    for worker in range(workers):
        lo, hi = (x * firsts[-1] // workers for x in (worker, worker + 1))
        run = []
        for problem, n in enumerate(lengths):
            first = firsts[problem]
            start, stop = max(lo - first, 0), min(hi - first, tiles[problem])
            if start < stop:
                run.append(Piece(problem, start * tile, min(stop * tile, n)))
        runs.append(run)
    return runs


def attend_run(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], run: Sequence[Piece], call: Call
) -> Partials:
    """What one worker does: (problem, (out, lse)) of each of its pieces.

    Row b of k, v (B, Hkv, L, D) holds lengths[b] keys and then padding; the queries of q
    (B, Hq, Lq, D) are its last ones. Problem b * Hkv + h is kv head h of row b.
    """
    heads, group, found = k.shape[1], q.shape[1] // k.shape[1], []
    for problem, start, stop in run:
        b, h = divmod(problem, heads)
        own = slice(h * group, (h + 1) * group)
        keys, values = (x[b : b + 1, h : h + 1, : lengths[b]] for x in (k, v))
        part = attend_span(q[b : b + 1, own], keys, values, start, stop, call)
        found.append((problem, part))
    return found


def fuse(q: Tensor, v: Tensor, found: Sequence[Partials]) -> tuple[Tensor, Tensor]:
    """(out, lse) from what all workers found; a problem that nobody had is 0 and -inf."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
    heads, group = v.shape[1], q.shape[1] // v.shape[1]
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for problem, part in (pair for worker in found for pair in worker):
        parts.setdefault(problem, []).append(part)
    for problem, own in parts.items():
        b, h = divmod(problem, heads)
        at = (slice(b, b + 1), slice(h * group, (h + 1) * group))
        out[at], lse[at] = ops.merge(own) if len(own) > 1 else own[0]
    return out, lse


@register(
    Card(
        name="lean",
        title="Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of "
        "Transformers",
        claim="decoding attention is cut into equal shares of tiles, whatever the lengths of the "
        "sequences and the number of heads; partial results merge exactly",
        kind="attention",
        family="decode",
        year=2024,
        paper=207,
        patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
        pretrained="exact",
        phases=("decode",),
        cost="that of dense attention, and at most workers + problems partial results",
        decoding="full KV cache",
        confidence="high: the paper's schedule; its workers are processors of a GPU",
        small={"tile": 16, "workers": 3},
    )
)
@dataclass(frozen=True, kw_only=True)
class Lean(Attention):
    """Dense attention in tiles of `tile` keys, shared out evenly among `workers`.

    workers None stands for the number of threads. The shares are computed one after the other,
    each by all threads: what it shows is that the schedule is exact, `plan` is what a machine
    with workers of its own needs. Under a mask it is dense attention in one piece.
    """

    tile: int = 256
    workers: int | None = None

    def __post_init__(self) -> None:
        ops.check_block("tile", self.tile)
        if self.workers is not None:
            ops.check_block("workers", self.workers)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Every worker's run, then the merged partial results."""
        if call.mask is not None:
            return dense_result(q, k, v, call)
        lengths = [k.shape[2]] * k.shape[0]
        problems = [n for n in lengths for _ in range(k.shape[1])]
        runs = plan(problems, self.tile, self.workers or torch.get_num_threads())
        found = [attend_run(q, k, v, lengths, run, call) for run in runs]
        return Result(*fuse(q, v, found))
