"""AdaSpa (2025, paper 65): exact searches at two of twenty denoising steps."""

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Call, Memory
from foveate.attention.sparse.adaspa import AdaSpa
from foveate.bench.claims import Outcome

CLAIM = "blocks searched twice, with budgets by head, err less than without either, or a window"

_STEPS, _FIRST, _AGAIN = 20, 2, 8
_BLOCKS, _BLOCK, _DIM = 32, 32, 32
_SHARPNESS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the queries, head by head

Inputs = tuple[Tensor, Tensor, Tensor]


def measure() -> Outcome:
    """Relative error to dense attention, mean over heads and the steps after the first search.

    All ways read 7 of 32 blocks: by searches at two steps or one, with or without budgets of
    heads, or around the query.
    """
    steps, figures = _denoising(), {}
    for named, searches, recall in (
        ("two searches and budgets", (_FIRST, _AGAIN), 0.8),
        ("two searches", (_FIRST, _AGAIN), 1.0),
        ("one search and budgets", (_FIRST,), 0.8),
    ):
        made = AdaSpa(block=_BLOCK, dense_steps=_FIRST, searches=searches, recall=recall)
        memory, errors = Memory(), []
        for step, (q, k, v) in enumerate(steps):
            out = made(q, k, v, causal=False, call=Call(step=step, memory=memory))
            errors.append(_error(out, (q, k, v)))
        figures[named] = sum(errors[_FIRST + 1 :]) / (_STEPS - _FIRST - 1)
    near = ops.neighborhood(_BLOCKS, 7).to_dense(_BLOCKS, _BLOCKS)
    window = ops.from_map(near, _BLOCK, (_BLOCKS * _BLOCK, _BLOCKS * _BLOCK))
    errors = [_error(ops.block_sparse(*x, window, causal=False), x) for x in steps]
    figures["window"] = sum(errors[_FIRST + 1 :]) / (_STEPS - _FIRST - 1)
    ours, *others = figures.values()
    return Outcome(figures, ours < min(others), "synthetic tokens whose noise shrinks steadily")


def _error(out: Tensor, inputs: Inputs) -> float:
    """Relative error to dense attention, mean over heads."""
    want = ops.attend(*inputs)
    return float(((out - want).norm(dim=(2, 3)) / want.norm(dim=(2, 3))).mean())


def _denoising() -> list[Inputs]:
    """q, k, v (1, H, L, D) of every step: themes of blocks, asked for in any order, and noise.

    Half of the noise belongs to blocks: noise of tokens alone would not move what blocks hold.
    """
    made, heads = torch.Generator().manual_seed(0), len(_SHARPNESS)
    themes = torch.randn(heads, _BLOCKS, _DIM, generator=made)
    asked = torch.stack([x[torch.randperm(_BLOCKS, generator=made)] for x in themes])
    q, k = (x.repeat_interleave(_BLOCK, 1)[None] for x in (asked, themes))
    wide = torch.randn(3, 1, heads, _BLOCKS, _DIM, generator=made).repeat_interleave(_BLOCK, 3)
    noise = (torch.randn(3, *q.shape, generator=made) + wide) / 2**0.5
    sharpness = torch.tensor(_SHARPNESS).view(1, -1, 1, 1)
    steps = []
    for step in range(_STEPS):
        level = 1.5 * (1 - step / _STEPS)
        now = [x + level * eps for x, eps in zip((q, k, k), noise, strict=True)]
        steps.append((sharpness * now[0], now[1], now[2]))
    return steps
