"""Scores in singular directions: how few carry the keys that heads look at most."""

from __future__ import annotations

from foveate.analysis.sparse_svd import SparseSvd
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids

CLAIM = "fewer singular directions than random ones of the same range carry a head's largest scores"

_LAYERS, _TOKENS = (1, 6, 11, 16, 18, 23), 192


def measure() -> Outcome:
    """All heads of six layers of the built-in model: median directions for 70 % of a score."""
    model, _ = loaded()
    heads = [(i, h) for i in _LAYERS for h in range(model.config.num_attention_heads)]
    figures: dict[str, float] = {}
    for name, skip_first in (("other keys", True), ("any key", False)):
        record = SparseSvd(skip_first=skip_first)(model, text_ids(_TOKENS), heads)
        own, random = (record[x][list(_LAYERS)] for x in ("directions", "random"))
        counted = ~own.isnan()
        own, random = own[counted], random[counted]
        figures |= {
            f"singular, {name}": float(own.median()),
            f"random, {name}": float(random.median()),
            f"share of heads with fewer, {name}": float((own < random).float().mean()),
        }
    few = figures["singular, other keys"] < figures["random, other keys"]
    return Outcome(figures, few and figures["share of heads with fewer, other keys"] > 0.5)
