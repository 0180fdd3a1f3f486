"""Heads that look at a fixed offset: previous-token heads on text, and none without training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.analysis.vit_heads import VitHeads
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids

CLAIM = "training makes heads that look at the previous token; a model without training has none"

_TEXTS, _TOKENS = 2, 128


def measure() -> Outcome:
    """Two texts of 128 tokens, a line of as many places."""
    model, _ = loaded()
    ids = text_ids(_TEXTS * _TOKENS).view(_TEXTS, _TOKENS)
    trained, random = _figures(model, ids), _figures(_untrained(model), ids)
    figures = {
        f"{name}, {who}": x
        for who, found in (("trained", trained), ("untrained", random))
        for name, x in found.items()
    }
    holds = trained["previous-token heads"] > 0 and random["offset-local heads"] == 0
    return Outcome(figures, holds)


def _figures(model: Any, ids: Tensor) -> dict[str, float]:
    record = VitHeads(grid=(1, _TOKENS), special=0)(model, ids)
    local, back = record["offset_local"].bool(), record["peak_column"]
    return {
        "previous-token heads": int((local & (back == -1)).sum()),
        "offset-local heads": int(local.sum()),
        "largest peak": float(record["peak"].max()),
    }


def _untrained(model: Any) -> Any:
    """A model of the same shape with random weights, the same at every call."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(model.config).eval()
