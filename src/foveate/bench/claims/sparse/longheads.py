"""LongHeads (2024, paper 47): a pass key found far beyond what any query attends to."""

from typing import Any

from foveate.attention.sparse.longheads import LongHeads
from foveate.attention.sparse.sink_window import SinkWindow
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.needles import ANSWER_TOKENS, answered, needle_prompt, pass_key
from foveate.bench.runs import answer

CLAIM = "with attention to 512 tokens, chosen chunks find pass keys that a window never sees"

_TOKENS, _ATTENTION, _DEPTHS = 2048, 512, (0.1, 0.3, 0.5)


def measure() -> Outcome:
    """Share of pass keys recalled at depths that lie outside of the window."""
    window: Any = SinkWindow(sinks=16, window=_ATTENTION - 16)
    chunks: Any = LongHeads(chunk=64, attention=_ATTENTION)
    model, tokenizer = loaded()
    hay = text_ids(_TOKENS)
    figures = {}
    for name, mechanism in (("chunks", chunks), ("window", window), ("dense", None)):
        hits = 0
        for depth in _DEPTHS:
            key = pass_key(depth, 0)
            prompt = needle_prompt(tokenizer, hay, depth, key, _TOKENS)
            slots = {} if mechanism is None else {"prefill": mechanism, "decode": mechanism}
            hits += answered(tokenizer.decode(answer(model, slots, prompt, ANSWER_TOKENS))) == key
        figures[f"recalled, {name}"] = hits / len(_DEPTHS)
    return Outcome(figures, figures["recalled, chunks"] > figures["recalled, window"])
