"""Deception: attention pooling that decides by a word which it does not seem to look at."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from foveate.analysis.deceptive_attn import DeceptiveAttn
from foveate.bench.claims import Outcome
from foveate.bench.claims._pooling import Pooler, attended, supervised, train
from foveate.tasks.planted_token import Planted, planted_token

CLAIM = "attention hides the word that decides, at no loss, if states are mixed"

_SENTENCES = partial(planted_token, words=1, lengths=(24, 24))
_STEPS = 400


def measure() -> Outcome:
    """Accuracy and mass on the planted words at penalties 0 and 1, with an LSTM and without."""
    test = _SENTENCES(500, seed=-1)
    figures = {}
    for name, mixing in (("LSTM", True), ("no mixing", False)):
        for weight in (0.0, 1.0):
            model = train(partial(_loss, weight), _drawn, steps=_STEPS, mixing=mixing)
            accuracy, weights = attended(model, test)
            figures[f"accuracy, {name}, weight {weight:.0f}"] = accuracy
            figures[f"mass, {name}, weight {weight:.0f}"] = float(test.mass(weights).mean())
    looked = figures["mass, LSTM, weight 0"] > 0.5
    return Outcome(figures, looked and _hides(figures, "LSTM") and not _hides(figures, "no mixing"))


def _hides(figures: dict[str, float], name: str) -> bool:
    """Whether the penalty took all mass from the planted words and left the accuracy."""
    lost = figures[f"accuracy, {name}, weight 0"] - figures[f"accuracy, {name}, weight 1"]
    return figures[f"mass, {name}, weight 1"] < 0.01 and lost < 0.02


def _loss(
    weight: float, model: Pooler, batch: Planted, states: Tensor, logits: Tensor, step: int
) -> Tensor:
    penalty = DeceptiveAttn(weight=weight)(logits, batch.planted)
    return supervised(model, batch, states, logits) + penalty


def _drawn(step: int) -> Planted:
    return _SENTENCES(64, seed=step)
