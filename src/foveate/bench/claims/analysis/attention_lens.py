"""Attention lens: heads of one layer of the built-in model, read in words."""

from __future__ import annotations

import math

import torch

from foveate.analysis.attention_lens import AttentionLens
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.hf.parts import head_logits

CLAIM = "trained maps of heads say what the model does better than answers blind to the text"

_LAYER, _SEEN, _TEST = 18, 1280, 128
# Biases of 9 heads, each moved by at most the rate a step, must learn how frequent words are.
_LR, _STEPS = 5e-3, 100


def measure() -> Outcome:
    """Divergence (nats) on text that was not seen, beside that of answers blind to the text."""
    model, _ = loaded()
    seen = text_ids(_SEEN).view(4, -1)
    lens = AttentionLens(layer=_LAYER, lr=_LR, steps=_STEPS, batch=32)(model, seen)
    test = lens.collect(text_ids(_TEST, skip=_SEEN))
    with torch.no_grad():
        trained = float(lens.divergence(test))
        for parameter in (lens.up, lens.bias):
            parameter.zero_()
        plain = float(lens.divergence(test))
        mean = torch.stack(
            [
                head_logits(model, x).softmax(-1).mean(0)
                for x in lens.collect(seen).hidden.split(256)
            ]
        ).mean(0)
        said = head_logits(model, test.hidden).log_softmax(-1)
        blind = float((said.exp() * (said - mean.log())).sum(-1).mean())
        uniform = float((said.exp() * said).sum(-1).mean()) + math.log(said.shape[-1])
    figures = {
        "divergence, trained": trained,
        "divergence, unembedding": plain,
        "divergence, mean of the texts seen": blind,
        "divergence, uniform": uniform,
        "best divergence of what was held out": min(lens.losses),
        "looks at what was held out": float(len(lens.losses)),
    }
    return Outcome(figures, trained < min(plain, blind, uniform))
