"""Sinks of the built-in model, and of small models with and without normalised weights."""

from __future__ import annotations

import torch

from foveate.analysis.base import Record
from foveate.analysis.sink_metric import SinkMetric, importance
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.claims.analysis._backcopy import Copier
from foveate.ops import Normalizer, Sigmoid

CLAIM = "the first token is a sink in most heads, but in none where sigmoids are the weights"

_TEXTS, _TOKENS = 20, 64
_STEPS = 300


def measure() -> Outcome:
    """Twenty texts of 64 tokens, of random tokens, of one token; toys of two layers."""
    model, tokenizer = loaded()
    made = torch.Generator().manual_seed(0)
    text = text_ids(_TEXTS * _TOKENS).view(_TEXTS, _TOKENS)
    drawn = torch.randint(len(tokenizer), (_TEXTS, _TOKENS), generator=made)
    natural, random, repeated = (
        SinkMetric()(model, ids)
        for ids in (text, drawn, drawn[:, :1].expand(-1, _TOKENS).contiguous())
    )
    softmax, sigmoid = _toy(None), _toy(Sigmoid())
    shallow = _toy(Sigmoid(), layers=1)
    figures = {
        "% of heads, first token": _percent(natural),
        "% of heads, others": 100 * float(natural["elsewhere"].mean()),
        "% of heads, random tokens": _percent(random),
        "% of heads, one token repeated": _percent(repeated),
        "norm of the first token over the others', layer 15": float(natural["residual"][15]),
        "mean weight of the start token, softmax": softmax,
        "mean weight of the start token, sigmoid": sigmoid,
        "mean weight of the start token, sigmoid, one layer": shallow,
    }
    holds = _percent(natural) > 50 and softmax > 0.3 > sigmoid
    remark = "a toy of one layer rests on the start token even with sigmoids"
    return Outcome(figures, holds, remark if shallow > 0.3 else "")


def _percent(record: Record) -> float:
    return 100 * float(record["sink"].mean())


def _toy(rule: Normalizer | None, layers: int = 2) -> float:
    """Mean weight of the start token in the layer of a toy where it is largest, rows of sum 1."""
    trained = Copier(rule, layers=layers, steps=_STEPS)
    weights = (trained.judged(layer).weights for layer in range(layers))
    return max(float(importance(x)[..., 0].mean()) for x in weights)
