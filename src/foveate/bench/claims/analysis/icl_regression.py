"""In-context linear regression: softmax heads trained on it, and the steps they come to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.analysis.icl_regression import IclRegression, predict
from foveate.bench.claims import Outcome
from foveate.tasks.icl_linreg import best_rate, icl_linreg
from foveate.tasks.train import fit

CLAIM = "trained heads of both signs are together a debiased gradient step, which one head is not"

_LENGTH, _DIM, _NOISE, _STEPS = 40, 5, 0.1, 2500
_START = 0.02


def measure() -> Outcome:
    """Squared error of 1, 2 and 4 heads with full matrices, at the trained length and at others."""
    heads = {count: _trained(count) for count in (1, 2, 4)}
    rate = best_rate(_LENGTH, _DIM, _NOISE, debiased=True)
    figures = {}
    for length in (20, 40, 160):
        test = icl_linreg(4000, seed=-1, length=length, dim=_DIM, noise=_NOISE)
        with torch.no_grad():
            for count, (kq, ov) in heads.items():
                loss = test.loss(predict(kq, ov, test.x, test.y, test.query))
                figures[f"error at {length}, heads: {count}"] = float(loss)
        step = test.gradient_step(rate, debiased=True)
        figures[f"error at {length}, gradient step"] = float(test.loss(step))
        figures[f"error at {length}, ridge"] = float(test.loss(test.ridge(_NOISE)))
    found = IclRegression()(*heads[4])
    figures |= {f"omega {i}": w for i, w in enumerate(found["omega"].tolist())}
    figures |= {f"mu {i}": w for i, w in enumerate(found["mu"].tolist())}
    figures["share of KQ off its diagonal"] = float(found["off"].max())
    figures["|sum of mu| over sum of |mu|"] = float(found["balance"])
    both = bool(found["omega"].min() < 0 < found["omega"].max()) and float(found["agree"]) == 1
    near = figures["error at 40, heads: 4"] < 1.2 * figures["error at 40, gradient step"]
    better = figures["error at 40, heads: 4"] < figures["error at 40, heads: 1"]
    return Outcome(figures, both and near and better)


def _trained(heads: int) -> tuple[Tensor, Tensor]:
    """KQ and OV of heads trained from small random matrices."""
    made = torch.Generator().manual_seed(0)
    shape = (heads, _DIM + 1, _DIM + 1)
    kq, ov = (nn.Parameter(_START * torch.randn(shape, generator=made)) for _ in range(2))

    def loss(step: int) -> Tensor:
        rows = icl_linreg(256, seed=step, length=_LENGTH, dim=_DIM, noise=_NOISE)
        return rows.loss(predict(kq, ov, rows.x, rows.y, rows.query))

    fit((kq, ov), loss, steps=_STEPS, lr=1e-2)
    return kq, ov
