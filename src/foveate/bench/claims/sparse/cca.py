"""CCA (2024, paper 231): core tokens for the far context, in a model not tuned for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.base import Call
from foveate.attention.sparse.cca import CCA
from foveate.attention.sparse.sink_window import SinkWindow
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import judge

CLAIM = "untuned, core tokens lose less perplexity than a window alone or than mean pooling"

_TOKENS, _GROUP, _WINDOW = 2048, 16, 256


@dataclass(frozen=True, kw_only=True)
class _Means(CCA):
    """Cores that are plain means."""

    def weights(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """Equal shares."""
        return torch.full(k.shape[:-1], 1 / self.group, device=k.device)


def measure() -> Outcome:
    """Perplexity of 2,048 tokens; the window alone is as long as cca's longest local part."""
    ways = {
        "dense": None,
        "cca": CCA(group=_GROUP, window=_WINDOW),
        "means": _Means(group=_GROUP, window=_WINDOW),
        "window": SinkWindow(sinks=0, window=_WINDOW + _GROUP),
    }
    loss = {name: judge(_TOKENS, way).perplexity for name, way in ways.items()}
    figures = {f"perplexity, {name}": value for name, value in loss.items()}
    return Outcome(figures, loss["cca"] < min(loss["means"], loss["window"]))
