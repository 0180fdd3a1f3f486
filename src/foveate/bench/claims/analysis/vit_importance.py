"""What heads are worth: effects of ablation on a text, and the slopes that stand for them."""

from __future__ import annotations

from foveate.analysis.base import rank_correlation
from foveate.analysis.vit_importance import VitImportance
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids

CLAIM = "few heads of a layer matter, and one backward pass ranks them much as ablation does"

# Some layers only: each head costs a pass.
_LAYERS, _TOKENS = (2, 7, 12, 17, 22, 27), 96


def measure() -> Outcome:
    """All heads of six layers of the built-in model, ablated one by one on a text."""
    model, _ = loaded()
    heads = [(i, h) for i in _LAYERS for h in range(model.config.num_attention_heads)]
    record = VitImportance()(model, text_ids(_TOKENS), heads=heads)
    effect, slope = (record[name][list(_LAYERS)] for name in ("loss", "proxy"))
    ordered = effect.abs().sort(1, descending=True).values
    share = float((ordered[:, :2].sum(1) / ordered.sum(1)).mean())
    figures = {
        "rank correlation of slope and effect": rank_correlation(slope, effect.abs()),
        "share of a layer's effects in two of nine heads": share,
        "largest rise of the loss": float(effect.max()),
        "median size": float(effect.abs().median()),
    }
    return Outcome(figures, figures["rank correlation of slope and effect"] > 0.5 and share > 0.5)
