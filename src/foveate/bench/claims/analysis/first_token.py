"""How far a changed token is felt when the first token is a sink, and when it is hidden."""

from __future__ import annotations

import torch

from foveate.analysis._loss import next_token_loss
from foveate.analysis.base import Record
from foveate.analysis.first_token import FirstToken, hide_first
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids

CLAIM = "a changed token is felt more by later ones where the first token, a sink, is hidden"

_TEXTS, _TOKENS, _CHANGED, _APART, _SINK = 10, 64, 8, 8, 0.3


def measure() -> Outcome:
    """Ten texts with another ninth token; hidden in all layers, and from the first sink on."""
    model, tokenizer = loaded()
    ids = text_ids(_TEXTS * _TOKENS).view(_TEXTS, _TOKENS)
    other = ids.clone()
    made = torch.Generator().manual_seed(0)
    other[:, _CHANGED] = torch.randint(len(tokenizer), (_TEXTS,), generator=made)
    plain = FirstToken()(model, ids, other)
    layers = (plain["weight"].mean(1) > _SINK).nonzero()[:, 0].tolist()
    if not layers:
        return Outcome({"largest mean weight": float(plain["weight"].max())}, False)
    figures = {
        "first layer with a sink": layers[0],
        "% of heads > 0.8": 100 * float((plain["weight"] > 0.8).float().mean()),
        "% of heads > 0.3": 100 * float((plain["weight"] > 0.3).float().mean()),
        "spread": _felt(plain),
        "loss": next_token_loss(model, ids),
    }
    for name, start in (("all layers", 0), ("layers from the sink on", layers[0])):
        figures[f"spread, {name}"] = _felt(FirstToken(hidden_from=start)(model, ids, other))
        with hide_first(model, start):
            figures[f"loss, {name}"] = next_token_loss(model, ids)
    return Outcome(figures, figures["spread, layers from the sink on"] > figures["spread"])


def _felt(record: Record) -> float:
    """Mean change after the last block of tokens that are some way behind the changed one."""
    return float(record["spread"][-1, :, _CHANGED + _APART :].mean())
