"""Heads that copy a needle: how many there are, and what recall is without them."""

from __future__ import annotations

import torch

from foveate.analysis.base import Head
from foveate.analysis.retrieval_head import RetrievalHead, answer_accuracy
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded
from foveate.hf.ablate import ablate
from foveate.tasks.needle_kv import needles
from foveate.tasks.prompt import Prompt

CLAIM = "a needle is recalled by few heads that copy: masking ten breaks it, ten others do not"

_MASKED, _TOP, _DRAWS = 10, 40, 3


def measure() -> Outcome:
    """Eight needles in 273 tokens; heads to mask beside the best are drawn below rank 40."""
    model, tokenizer = loaded()
    prompts = [
        prompt
        for depth in (0.25, 0.75)
        for prompt in needles(tokenizer, rows=4, seed=int(100 * depth), depth=depth)
    ]
    record = RetrievalHead()(model, prompts)
    (line_break,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    spoken = RetrievalHead(decode=True, new_tokens=16, stop=(line_break,))(model, prompts)
    ranked, made = record.ranked(), torch.Generator().manual_seed(0)
    rest = ranked[_TOP:]
    drawn = [
        [rest[i] for i in torch.randperm(len(rest), generator=made)[:_MASKED].tolist()]
        for _ in range(_DRAWS)
    ]
    plain = answer_accuracy(model, prompts)
    best = _masked(prompts, ranked[:_MASKED])
    others = sum(_masked(prompts, heads) for heads in drawn) / _DRAWS
    figures = {
        "share of heads >= 0.1": float((record["retrieval"] >= 0.1).float().mean()),
        "share of heads > 0.5": float((record["retrieval"] > 0.5).float().mean()),
        "best head": float(record["retrieval"].max()),
        "best ten, Jaccard with decoding": record.overlap(spoken, _MASKED),
        "accuracy": plain,
        "accuracy, 10 best masked": best,
        "accuracy, 10 others masked": others,
    }
    names = ", ".join(f"({layer}, {head})" for layer, head in ranked[:5])
    holds = best < plain / 2 and others > 0.8 * plain
    return Outcome(figures, holds, f"the best heads are {names}")


def _masked(prompts: list[Prompt], heads: list[Head]) -> float:
    """Accuracy while some heads give 0."""
    model, _ = loaded()
    with ablate(model, heads):
        return answer_accuracy(model, prompts)
