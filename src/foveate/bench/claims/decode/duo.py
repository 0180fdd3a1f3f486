"""DuoAttention (2024): which heads need every token is told by how they retrieve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import foveate
from foveate.analysis.base import Record
from foveate.analysis.retrieval_head import RetrievalHead
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded
from foveate.hf.parts import body, head_logits
from foveate.tasks.needle_kv import needles
from foveate.tasks.prompt import Prompt

CLAIM = "retrieval heads that keep every token win back what streaming heads lose, others do not"

_TOP, _BUDGET, _QUESTION, _DRAWS = 40, 64, 24, 2


def measure() -> Outcome:
    """Eight needles in 273 tokens, read and evicted before the last 24 of them, the question.

    Heads are ranked on other texts. The same number of kv heads is drawn at random beside them.
    """
    found = RetrievalHead()(loaded()[0], _prompts(0))
    kept = len(found.kv_heads(_TOP, 3))
    fresh = _prompts(1000)
    made = torch.Generator().manual_seed(0)
    drawn = [_drawn(found, kept, made) for _ in range(_DRAWS)]
    figures = {
        "kv heads of 90 that keep every token": float(kept),
        "accuracy, full cache": _accuracy(fresh, None),
        "accuracy, retrieval heads full": _accuracy(fresh, found.cache_plan(_TOP, 3, _BUDGET)),
        "accuracy, as many others full": sum(_accuracy(fresh, plan) for plan in drawn) / _DRAWS,
        "accuracy, no head full": _accuracy(fresh, f"window:budget={_BUDGET}"),
    }
    _, full, *some, none = figures.values()
    won = [(x - none) / (full - none) for x in some]
    figures["share of the loss won back, retrieval heads"] = won[0]
    figures["share of the loss won back, others"] = won[1]
    return Outcome(figures, full > none and won[0] > 0.7 and won[1] < 0.3)


def _prompts(seed: int) -> list[Prompt]:
    """Needles at a quarter and at three quarters of the text."""
    _, tokenizer = loaded()
    made = (needles(tokenizer, rows=4, seed=seed + i, depth=0.25 + i / 2) for i in range(2))
    return [prompt for some in made for prompt in some]


def _drawn(record: Record, kept: int, made: torch.Generator) -> list[str | None]:
    """A plan that keeps as many kv heads, drawn at random."""
    layers = record["retrieval"].shape[0]
    score = torch.rand(layers, 3, generator=made)
    own = Record("random", {"x": score}, {"x": ("layer", "head")}, "x")
    return own.cache_plan(kept, 3, _BUDGET)


@torch.no_grad()
def _accuracy(prompts: Sequence[Prompt], cache: Any) -> float:
    """Share of the tokens of the answers that are predicted, each after the right ones."""
    model, _ = loaded()
    right = []
    for prompt in prompts:
        ids, n = prompt.with_answer(), len(prompt.answer)
        cut = prompt.ids.shape[1] - _QUESTION
        with foveate.attach(model, cache=cache):
            held = body(model)(ids[:, :cut], use_cache=True).past_key_values
            out = body(model)(ids[:, cut:], past_key_values=held, use_cache=True)
        rows = out.last_hidden_state[0, -n - 1 : -1]
        right.append(head_logits(model, rows).argmax(-1) == prompt.answer)
    return float(torch.cat(right).float().mean())
