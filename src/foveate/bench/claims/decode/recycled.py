"""Recycled Attention (2024, paper 315): what a step attended to serves the steps after it."""

from foveate.attention.decode.recycled import Recycled
from foveate.attention.sparse.sink_window import SinkWindow
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import text_ids
from foveate.bench.claims._decoding import Prompt, sparse_mass
from foveate.bench.runs import divergence

CLAIM = (
    "256 tokens that every tenth step chooses keep more attention mass in the steps between, and "
    "decode closer to dense, than sinks and a window of equal size"
)

_PROMPT, _STEPS, _BUDGET = 2048, 30, 256


def measure() -> Outcome:
    """Mass kept by sparse steps, KL and top-1 agreement with dense decoding of a text."""
    ids = text_ids(_PROMPT + _STEPS)
    prompt, then = Prompt(ids[:, :_PROMPT]), ids[:, _PROMPT:]
    dense = prompt.decode(then, None)
    figures: dict[str, float] = {}
    for name, way in (
        ("recycled", Recycled(budget=_BUDGET, stride=10)),
        ("window", SinkWindow(sinks=4, window=_BUDGET - 4)),
    ):
        logits, mass = sparse_mass(prompt, then, way)
        kl, top1 = divergence(dense, logits)
        figures |= {f"mass kept, {name}": mass, f"KL, {name}": kl, f"top-1, {name}": top1}
    more = figures["mass kept, recycled"] > figures["mass kept, window"]
    return Outcome(figures, more and figures["KL, recycled"] < figures["KL, window"])
