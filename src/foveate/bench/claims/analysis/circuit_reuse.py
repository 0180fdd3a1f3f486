"""Circuits of two tasks, and name movers made to look at the wrong or at the right name."""

from __future__ import annotations

import torch

from foveate.analysis._prompts import last_logits, looks
from foveate.analysis.base import Head, Record
from foveate.analysis.circuit_reuse import CircuitReuse, circuit, differences, look_at, reused
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded
from foveate.hf.parts import head_logits, run
from foveate.tasks.ioi import colored_objects, ioi
from foveate.tasks.prompt import Prompt

CLAIM = "two tasks share their direct heads, and where these look decides the answer"

_PROMPTS, _MOVERS = 8, 5


def measure() -> Outcome:
    """Indirect objects and colored objects on the built-in model: the direct step of circuits."""
    model, tokenizer = loaded()
    names = ioi(tokenizer, rows=_PROMPTS, seed=0)
    colors = colored_objects(tokenizer, rows=_PROMPTS, seed=0)
    ours, theirs = (CircuitReuse()(model, prompts) for prompts in (names, colors))
    share = len(circuit(ours)) / ours["found"].numel()
    plain = float(differences(names)(last_logits(model, names)[None]).mean())
    movers = _movers(names, ours)
    wrong, right = (_forced(names, movers, name) for name in ("wrong", "answer"))
    figures = {
        "share of the heads of one circuit in the other": reused(ours, theirs),
        "share by chance": share,
        "logit difference": plain,
        "movers to the wrong name": wrong,
        "movers to the right name": right,
    }
    holds = figures["share of the heads of one circuit in the other"] > 0.5 and right > wrong
    return Outcome(figures, holds)


def _movers(prompts: list[Prompt], record: Record) -> list[Head]:
    """Heads of the largest direct effects among those that speak for the name they look at.

    Others hold back what they look at: the first of all ranks looks at the giver.
    """
    mass = looks(loaded()[0], prompts, {"right": ("answer",), "wrong": ("wrong", "giver")})
    helps = record["effect 0"] < 0
    ranked = record.ranked()
    return [h for h in ranked if helps[h] and mass["right"][h] > mass["wrong"][h]][:_MOVERS]


@torch.no_grad()
def _forced(prompts: list[Prompt], heads: list[Head], name: str) -> float:
    """Mean logit difference when the last rows of heads look at one name."""
    model, _ = loaded()
    total = 0.0
    for prompt in prompts:
        with look_at(model, heads, prompt, name):
            logits = head_logits(model, run(model, prompt.ids)[:, -1])
        total += float(prompt.difference(logits))
    return total / len(prompts)
