"""Where the sinks are: in the built-in model, and in a small encoder that looks both ways."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.analysis.sink_geometry import KINDS, SinkGeometry
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.claims.analysis._periodic import LENGTH, filler, framed
from foveate.tasks.masked_periodic import masked_periodic

CLAIM = "a decoder's layers have one sink in the centre, an encoder's one at each end"

_TEXTS, _TOKENS = 4, 128


def measure() -> Outcome:
    """Four texts of 128 tokens; 32 periodic rows between two marks for the encoder."""
    rows = framed(masked_periodic(32, seed=1_000_000, length=LENGTH).inputs)
    decoder = _figures(loaded()[0], text_ids(_TEXTS * _TOKENS).view(_TEXTS, _TOKENS))
    encoder = _figures(filler(causal=False), rows)
    figures = {
        f"{name}, {who}": x
        for who, found in (("decoder", decoder), ("encoder", encoder))
        for name, x in found.items()
    }
    ends = encoder["share bidirectional"] > 0.5
    remark = "" if ends else "a small encoder gives its start and end tokens no weight"
    return Outcome(figures, decoder["share centralised"] > 0.5 and ends, remark)


def _figures(model: Any, ids: Tensor) -> dict[str, float]:
    record = SinkGeometry()(model, ids)
    kinds = {
        f"share {kind}": float((record["kind"] == i).float().mean()) for i, kind in enumerate(KINDS)
    }
    names = ("gini", "first", "connectivity", "radius")
    return kinds | {name: float(record[name].mean()) for name in names}
