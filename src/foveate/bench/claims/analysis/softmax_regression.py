"""Softmax regression: how far gradient steps move its output, beside what bounds them."""

from __future__ import annotations

import torch

from foveate.analysis.softmax_regression import SoftmaxRegression
from foveate.bench.claims import Outcome
from foveate.tasks.icl_softmax_reg import icl_softmax_reg

CLAIM = "a gradient step and an equal shift of the data move the output alike, within one bound"


def measure() -> Outcome:
    """A thousand regressions at random x, in float64: ratios of the changes to their bounds."""
    data = icl_softmax_reg(1000, seed=0, dtype=torch.float64)
    made = torch.Generator().manual_seed(1)
    x = torch.randn(data.x.shape, generator=made, dtype=torch.float64)
    record = SoftmaxRegression()(data, x)
    apart = (record["moved"] - record["moved_by_shift"]).abs().max()
    figures = {"largest difference of the two changes": float(apart)}
    for name in ("step", "shift"):
        ratio = record["moved"] / record[f"{name}_bound"]
        figures[f"change over the bound of a {name}, mean"] = float(ratio.mean())
        figures[f"change over the bound of a {name}, largest"] = float(ratio.max())
    largest = max(value for name, value in figures.items() if name.endswith("largest"))
    return Outcome(figures, largest <= 1 and float(apart) < 1e-12)
