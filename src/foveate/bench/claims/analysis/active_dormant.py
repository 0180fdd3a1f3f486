"""A head that rests on the start token where there is nothing to copy, and one that need not."""

from __future__ import annotations

from torch import Tensor

from foveate.bench.claims import Outcome
from foveate.bench.claims.analysis._backcopy import Copier
from foveate.ops import Normalizer, Relu

CLAIM = "a softmax head rests on a start token of small value when it has no work, a ReLU one is 0"

_STEPS = 600


def measure() -> Outcome:
    """Toys of one head that copy back after triggers: softmax, and ReLU over the row count.

    Whether a sink forms depends on the embeddings at the start, so the softmax toy is trained from
    small ones too.
    """
    softmax, relu = _figures(None), _figures(Relu(mean=True))
    small = _figures(None, std=0.02)
    figures = {
        f"{name}, {who}": x
        for who, found in (("softmax", softmax), ("ReLU", relu))
        for name, x in found.items()
    }
    figures["start weight, no trigger, softmax from 0.02"] = small["start weight, no trigger"]
    figures["loss, trigger, softmax from 0.02"] = small["loss, trigger"]
    rests = softmax["start weight, no trigger"] > 0.3 > softmax["start weight, trigger"]
    drained = softmax["value norm of start"] < 0.5 and softmax["output, no trigger / trigger"] < 0.5
    remark = "with small embeddings at the start the task is learned, and no sink forms"
    none = small["start weight, no trigger"] < 0.05
    holds = rests and drained and relu["start weight, no trigger"] < 0.05
    return Outcome(figures, holds, remark if none else "")


def _figures(rule: Normalizer | None, std: float = 1) -> dict[str, float]:
    """Means over rows but the first two; norms of values over the mean of the other tokens'."""
    seen = Copier(rule, steps=_STEPS, std=std).judged()
    idle = ~seen.trigger
    idle[:, :2] = False
    weights, norm = seen.weights[:, 0], seen.values[:, 0].norm(dim=-1)
    out = seen.outputs[:, 0].norm(dim=-1)

    def mean(x: Tensor, rows: Tensor) -> float:
        return float(x[rows].mean())

    return {
        "start weight, no trigger": mean(weights[..., 0], idle),
        "start weight, trigger": mean(weights[..., 0], seen.trigger),
        "mass, no trigger": mean(weights.sum(-1), idle),
        "value norm of start": float(norm[:, 0].mean() / norm[:, 1:].mean()),
        "output, no trigger / trigger": mean(out, idle) / mean(out, seen.trigger),
        "loss, trigger": seen.losses[0],
        "excess loss, no trigger": seen.losses[1],
    }
