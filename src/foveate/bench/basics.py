"""Paired timings of the house itself: overhead of attaching, block-sparse gain, selection cost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Call
from foveate.bench.peak import prefill_bytes
from foveate.bench.timing import paired
from foveate.hf.attach import attach
from foveate.hf.parts import body, head_logits
from foveate.registry import create

# The shape of one attention layer of the built-in model.
HEADS, KV_HEADS, DIM = 9, 3, 64
_LONG = 8192


@dataclass(frozen=True)
class Line:
    """One measured line: its name, the figure with its unit, and the bar it is held to."""

    name: str
    figure: str
    bar: str
    met: bool


def layer_inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (1, 9, L, 64), k and v (1, 3, L, 64)."""
    made = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, length, DIM, generator=made)
    k, v = (torch.randn(1, KV_HEADS, length, DIM, generator=made) for _ in range(2))
    return q, k, v


Load = Callable[[], tuple[Any, Tensor]]
"""Gives a model and tokens (1, >= 8000) for it."""


@torch.inference_mode()
def measure(load: Load, rounds: int, only: Sequence[str] = ()) -> Iterator[Line]:
    """Lines of `PARTS`, or of some of them, one after the other.

    Raises ValueError for unknown parts.
    """
    if unknown := set(only) - set(PARTS):
        raise ValueError(f"no part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    for name in only or PARTS:
        yield from PARTS[name](load, rounds)


def _attach_overhead(load: Load, rounds: int) -> Iterator[Line]:
    model, ids = load()
    ids = ids[:, :4096]

    def attached() -> None:
        with attach(model, prefill="dense", decode="dense"), ops.backend("torch"):
            body(model)(ids, use_cache=True)

    with_it, plain, ratio = paired(attached, lambda: body(model)(ids, use_cache=True), rounds)
    figure = f"{100 * (ratio - 1):+.1f} % ({with_it:.2f} s against {plain:.2f} s)"
    name = "attach with dense on PyTorch's kernels at 4k prefill, over the plain model"
    yield Line(name, figure, "≤ +2 %", ratio <= 1.02)


def _dense_gain(load: Load, rounds: int) -> Iterator[Line]:
    model, ids = load()
    ids = ids[:, :8000]
    last: dict[str, Tensor] = {}

    def plain() -> None:
        last["plain"] = body(model)(ids, use_cache=True).last_hidden_state[0, -64:]

    def attached() -> None:
        with attach(model):
            last["own"] = body(model)(ids, use_cache=True).last_hidden_state[0, -64:]

    slow, fast, ratio = paired(plain, attached, min(rounds, 3))
    own, want = (head_logits(model, last[name]) for name in ("own", "plain"))
    gap = float(((own - want).abs() / (1 + want.abs())).max())
    figure = f"{ratio:.2f}× ({fast:.1f} s against {slow:.1f} s), logits within {gap:.0e}"
    name = "exact dense attention through attach at 8k prefill, over the plain model"
    yield Line(name, figure, "≥ 1.2×, 1e-4", ratio >= 1.2 and gap <= 1e-4)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)


def _block_sparse(load: Load, rounds: int) -> Iterator[Line]:
    q, k, v = layer_inputs(_LONG)
    blocks = _LONG // 128
    made = torch.Generator().manual_seed(1)
    scores = torch.rand(1, HEADS, blocks, blocks, generator=made)
    visible = ops.causal_map((_LONG, _LONG), (128, 128))
    chosen = ops.force(ops.top_k(scores, blocks // 8 - 1, visible=visible), visible, local=1)
    layout = ops.from_map(chosen, 128, (_LONG, _LONG))
    dense, sparse, ratio = paired(
        _dense(q, k, v), lambda: ops.block_sparse(q, k, v, layout), rounds
    )
    figure = f"{ratio:.2f}× ({sparse:.3f} s against {dense:.3f} s)"
    name = "block_sparse at 8k, blocks of 128, an eighth of the key blocks, over dense SDPA"
    yield Line(name, figure, "≥ 1.8×", ratio >= 1.8)


def _selection(load: Load, rounds: int) -> Iterator[Line]:
    q, k, v = layer_inputs(_LONG)
    for name in ("moba", "prism", "flexprefill"):
        choose = partial(create(name).select, q, k, Call())
        part, dense, ratio = paired(choose, _dense(q, k, v), rounds)
        figure = f"{100 * ratio:.1f} % ({part * 1e3:.0f} ms of {dense * 1e3:.0f} ms)"
        title = f"selection of {name} at 8k, share of dense attention"
        yield Line(title, figure, "≤ 5 %", ratio <= 0.05)


def _import_time(load: Load, rounds: int) -> Iterator[Line]:
    def run(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    ours, theirs, _ = paired(run("import torch, foveate"), run("import torch"), rounds)
    figure = f"{ours - theirs:+.2f} s (torch alone {theirs:.2f} s)"
    yield Line("import foveate beyond import torch", figure, "≤ 0.3 s", ours - theirs <= 0.3)


def _peak_memory(load: Load, rounds: int) -> Iterator[Line]:
    dense = prefill_bytes("dense", _LONG)
    for name in ("sink_window", "flexprefill", "prism", "moba", "hip"):
        own = prefill_bytes(f"prefill={name}", _LONG)
        figure = f"{own / dense:.2f}× ({own / 1e6:.0f} MB against {dense / 1e6:.0f} MB)"
        yield Line(
            f"peak memory of {name} at 8k prefill, over dense", figure, "≤ 1.2×", own <= 1.2 * dense
        )


PARTS: dict[str, Callable[[Load, int], Iterator[Line]]] = {
    "attach": _attach_overhead,
    "dense": _dense_gain,
    "block_sparse": _block_sparse,
    "selection": _selection,
    "import": _import_time,
    "memory": _peak_memory,
}
"""What is measured, by name."""
