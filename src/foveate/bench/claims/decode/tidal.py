"""TidalDecode (2024, paper 238): tokens that matter in one layer matter in the layers after."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Attention, Call, Result, dense_result
from foveate.attention.decode.tidal import Tidal
from foveate.attention.sparse.sink_window import SinkWindow
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import text_ids
from foveate.bench.claims._decoding import Prompt
from foveate.bench.runs import divergence
from foveate.registry import Card

CLAIM = (
    "of a layer's top 256 tokens more are those of the layer before than of one far before, and "
    "reading two layers' choices decodes closer to dense than a window of equal size"
)

_PROMPT, _STEPS, _BUDGET = 2048, 24, 256
_SELECT, _CORRECT = 2, 12


@dataclass(frozen=True, kw_only=True)
class _Watch(Attention):
    """Dense attention that notes the tokens of the largest logits in each layer."""

    card = Card(
        name="watch", title="-", claim="-", kind="attention", family="decode", phases=("decode",)
    )
    best: dict[int, Tensor] = field(default_factory=dict, hash=False, compare=False)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Dense attention."""
        logits = ops.grouped_logits(q, k, 1.0)[0, :, 0]
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        self.best[call.layer] = chosen.scatter_(1, logits.topk(_BUDGET).indices, True)
        return dense_result(q, k, v, call)


def measure() -> Outcome:
    """Overlap of top tokens between layers; KL and top-1 agreement with dense decoding."""
    ids = text_ids(_PROMPT + _STEPS)
    prompt, then = Prompt(ids[:, :_PROMPT]), ids[:, _PROMPT:]
    watch, near, far = _Watch(), 0.0, 0.0

    def note(_: object) -> None:
        nonlocal near, far
        last = max(watch.best)
        near += (_recall(watch, _SELECT + 1) + _recall(watch, _CORRECT + 1)) / 2
        far += (_recall(watch, _CORRECT - 1) + _recall(watch, last)) / 2

    dense = prompt.decode(then, watch, after=note)
    figures = {
        "overlap, next layer": near / _STEPS,
        "overlap, 9 and 17 layers on": far / _STEPS,
    }
    for name, way in (
        ("tidal", Tidal(budget=_BUDGET, select_layer=_SELECT, correct_layer=_CORRECT)),
        ("window", SinkWindow(sinks=4, window=_BUDGET - 4)),
    ):
        kl, top1 = divergence(dense, prompt.decode(then, way))
        figures |= {f"KL, {name}": kl, f"top-1, {name}": top1}
    return Outcome(figures, near > far and figures["KL, tidal"] < figures["KL, window"])


def _recall(watch: _Watch, layer: int) -> float:
    """Share of a layer's top tokens that the choosing layer before it has, too, head by head."""
    source = _CORRECT if layer > _CORRECT else _SELECT
    return float((watch.best[layer] & watch.best[source]).sum(1).float().mean()) / _BUDGET
