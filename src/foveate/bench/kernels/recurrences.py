"""`scan`: against the token loop at one length, and along the length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from foveate.bench.kernels.inputs import EQUAL, Inputs, random_qkv, read_and_written
from foveate.bench.kernels.race import Contender
from foveate.bench.kernels.rivals import LONGEST, SDPA, on_torch, sdpa, too_long
from foveate.bench.kernels.trial import Cast, Line, Rival, Trial
from foveate.ops import scan

_LOOP, _CHUNKS = "token loop", "torch chunks"
_NONE, _SCALAR, _CHANNELS = "no decay", "scalar decay", "decay per channel"
_DELTA, _GATED = "delta rule", "gated delta rule"
_KINDS = (_NONE, _SCALAR, _CHANNELS, _DELTA, _GATED)
# Goals over the token loop (kernel, torch chunks) and over dense SDPA.
_LOOP_GOALS = {_SCALAR: (20.0, 9.0), _CHANNELS: (8.0, 2.0), _DELTA: (12.0, 5.0)}
_DENSE_GOALS = {_SCALAR: 10.0, _CHANNELS: 4.0, _DELTA: 4.0}
# Dense SDPA runs once at the length of its goal, though that takes long.
_LOOP_LENGTH, _DENSE_LENGTH = 4096, 32768


def scan_trials(sizes: tuple[int, ...], quick: bool) -> Iterator[Trial]:
    """All kinds of recurrence against the loop; three of them over the lengths."""
    threads = torch.get_num_threads()
    for tokens in [n for n in sizes if n <= LONGEST] or [_LOOP_LENGTH]:
        for kind in _KINDS:
            label = f"scan, {tokens:,} tokens, {kind}"
            yield Trial("scan", label, threads, partial(_loop_cast, tokens, kind))
    lengths = sizes or (_LOOP_LENGTH, _DENSE_LENGTH, 131072)
    yield Trial("scan", "scan, along the length", threads, partial(_lengths_cast, lengths))


def _inputs(tokens: int) -> tuple[Inputs, dict[str, dict[str, Any]]]:
    """q, unit keys and v, and the options that make each kind of recurrence."""
    q, k, v = random_qkv(EQUAL, tokens)
    made = torch.Generator().manual_seed(2)
    beta = torch.rand(k.shape[:3], generator=made)
    gate = logsigmoid(torch.randn(k.shape[:3], generator=made))
    gates = logsigmoid(torch.randn(k.shape, generator=made))
    kinds: dict[str, dict[str, Any]] = {
        _NONE: {},
        _SCALAR: {"decay": gate},
        _CHANNELS: {"decay": gates, "side": "key"},
        _DELTA: {"beta": beta},
        _GATED: {"decay": gate, "beta": beta},
    }
    return (q, normalize(k, dim=-1), v), kinds


def _run(inputs: Inputs, options: dict[str, Any]) -> Callable[[], object]:
    return lambda: scan(*inputs, **options)


def _line(
    name: str,
    own: str,
    inputs: Inputs,
    options: dict[str, Any],
    rivals: dict[str, Rival],
    goals: dict[str, float],
) -> Line:
    """A line whose work is that of the recurrence, token by token."""
    tokens = inputs[0].shape[2]
    extra = [x for x in options.values() if isinstance(x, Tensor)]
    per_number = 4 + ("decay" in options) + 2 * ("beta" in options)
    flops = float(per_number * EQUAL.q * EQUAL.dim**2 * tokens)
    moved = read_and_written(*inputs, *extra)
    return Line(name, own, EQUAL.shape(tokens), flops, moved, rivals, goals)


def _loop_cast(tokens: int, kind: str) -> Cast:
    inputs, kinds = _inputs(tokens)
    options = kinds[kind]
    contenders = {
        "own": Contender(_run(inputs, options)),
        _CHUNKS: on_torch(_run(inputs, options)),
        _LOOP: Contender(_run(inputs, options | {"form": "recurrent"})),
    }
    loop = {_LOOP: Rival(_LOOP)}
    all_rivals = loop | {_CHUNKS: Rival(_CHUNKS)}
    bars = _LOOP_GOALS.get(kind) if tokens == _LOOP_LENGTH else None
    own_goals, chunk_goals = ({_LOOP: bar} for bar in bars) if bars else ({}, {})
    lines = [
        _line(kind, "own", inputs, options, all_rivals, own_goals),
        _line(f"{kind}, torch chunks", _CHUNKS, inputs, options, loop, chunk_goals),
    ]
    return Cast(contenders, lines)


def _lengths_cast(lengths: tuple[int, ...]) -> Cast:
    (q, k, v), kinds = _inputs(max(lengths))
    contenders: dict[str, Contender] = {}
    skipped: dict[str, str] = {}
    lines = []
    for tokens in lengths:
        inputs = q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens]
        dense, why = f"{SDPA} {tokens}", too_long(tokens)
        if why and tokens != _DENSE_LENGTH:
            skipped[dense] = why
        else:
            contenders[dense] = sdpa(inputs)
        for kind, goal in _DENSE_GOALS.items():
            own = f"{kind} {tokens}"
            options = {
                name: x[:, :, :tokens] if isinstance(x, Tensor) else x
                for name, x in kinds[kind].items()
            }
            contenders[own] = Contender(_run(inputs, options))
            rivals = {SDPA: Rival(dense)} | _shortest(kind, lengths[0], tokens)
            goals = {SDPA: goal} if tokens == _DENSE_LENGTH else {}
            lines.append(_line(f"{kind}, along the length", own, inputs, options, rivals, goals))
    return Cast(contenders, lines, skipped)


def _shortest(kind: str, first: int, tokens: int) -> dict[str, Rival]:
    """The first length as a rival, its time made as long: 1 is linear."""
    if tokens == first:
        return {}
    times = tokens / first
    return {f"linear from {first:,}": Rival(f"{kind} {first}", times)}
