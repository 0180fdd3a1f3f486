"""Capitals: what the last layer does to the token that the model is about to say."""

from __future__ import annotations

from foveate.analysis._prompts import first_answers, last_logits
from foveate.analysis.factual_recall import FactualRecall, scaled
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded
from foveate.tasks.factual import factual

CLAIM = "the last feed-forward part lowers the token that the model is about to say"


def measure() -> Outcome:
    """The built-in model on capitals: the sign of the last parts, and probabilities without them.

    The sum of all contributions against the logit is a check of the figures.
    """
    model, tokenizer = loaded()
    prompts = factual(tokenizer, seed=0)
    record = FactualRecall(target="top")(model, prompts)
    plain = last_logits(model, prompts)
    top = plain.argmax(-1, keepdim=True)
    sure = {}
    for factor in (1.0, 0.5, 0.0):
        with scaled(model, factor):
            sure[factor] = float(last_logits(model, prompts).softmax(-1).gather(1, top).mean())
    right = float((top[:, 0] == first_answers(prompts)).float().mean())
    figures = {
        "prompts": float(len(prompts)),
        "right": right,
        "share lowered by the last MLP": float(record["mlp negative"][-1]),
        "share lowered by the last attention": float(record["attention negative"][-1]),
        "last MLP, centred": float(record["mlp centred"][-1]),
        "largest part of a head": float(record["head centred"].max()),
        "error of the sum": float((record["constant"] / record["logit"]).abs()),
        **{f"probability at factor {factor}": value for factor, value in sure.items()},
    }
    lowers = figures["share lowered by the last MLP"] > 0.5
    return Outcome(figures, lowers and sure[0.5] > sure[1.0])
