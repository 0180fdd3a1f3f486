"""Secondary sinks of the built-in model: how many, in which layers, how strong."""

from __future__ import annotations

from foveate.analysis.base import rank_correlation
from foveate.analysis.secondary_sinks import SecondarySinks
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids

CLAIM = "tokens made alike by a feed-forward part are sinks for a while, where the first is weak"

_TEXTS, _TOKENS = 4, 270


def measure() -> Outcome:
    """Four texts of 270 tokens."""
    model, _ = loaded()
    record = SecondarySinks()(model, text_ids(_TEXTS * _TOKENS).view(_TEXTS, _TOKENS))
    chosen = record["secondary"]
    count = int(chosen.sum())
    if not count:
        return Outcome({"secondary sinks a text": 0.0}, False)
    onset, lifetime = (record[name][chosen].float() for name in ("onset", "lifetime"))
    weight = record["importance"]
    start, end = int(onset.min()), int((onset + lifetime).max())
    # The first token's own weight while there are secondary sinks, and after.
    during = float(weight[start:end, :, 0].mean())
    after = float(weight[end:, :, 0].mean())
    strength = float(record["strength"][chosen].mean())
    typical = float(weight[start:end, :, 1:].flatten().median())
    figures = {
        "secondary sinks a text": count / _TEXTS,
        "first layer": start,
        "last layer": end - 1,
        "lifetime, layers": float(lifetime.mean()),
        "mean weight": strength,
        "mean weight of a median token": typical,
        "first token, in these layers": during,
        "first token, after": after,
        "cosine of the feed-forward output with the first token": float(
            record["formed"][chosen].mean()
        ),
        "rank correlation of that output's norm and the weight": rank_correlation(
            record["formed_norm"][chosen], record["strength"][chosen]
        ),
        "largest cosine without three channels": float(
            record["cosine_rest"][start:end][:, chosen].abs().max()
        ),
    }
    formed = bool((record["formed"][chosen].abs() > SecondarySinks().cosine).float().mean() > 0.5)
    middle = start > 0 and end < len(weight)
    return Outcome(figures, middle and formed and strength > 3 * typical and during < after)
