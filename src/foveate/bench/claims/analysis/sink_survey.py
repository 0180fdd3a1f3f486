"""Sinks of the built-in model: used by a window, hidden, and silenced."""

from __future__ import annotations

from foveate.analysis.sink_survey import SinkSurvey
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids

CLAIM = "a window needs the first tokens, but as places for weight: their values hardly matter"

_TEXTS, _TOKENS = 2, 512


def measure() -> Outcome:
    """Perplexities of two texts under a window with and without sinks, hidden and silent ones."""
    model, _ = loaded()
    record = SinkSurvey(window=128)(model, text_ids(_TEXTS * _TOKENS).view(_TEXTS, -1))
    names = {
        "plain": "unchanged",
        "window": "window of 128",
        "window_sinks": "window of 128 and the first token",
        "hidden": "first token hidden",
        "silent": "first token's value 0",
    }
    figures = {f"perplexity, {words}": float(record[name].exp()) for name, words in names.items()}
    figures["% of weight on the first token"] = 100 * float(record["mass"].mean())
    figures["% of weight on the second token while the first is hidden"] = 100 * float(
        record["moved"].mean()
    )
    cost = {name: float(record[name] - record["plain"]) for name in names}
    used = cost["window_sinks"] < 0.5 * cost["window"]
    explained = cost["silent"] < 0.5 * cost["hidden"]
    return Outcome(figures, used and explained)
