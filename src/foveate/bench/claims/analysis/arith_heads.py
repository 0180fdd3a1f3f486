"""Heads of sums: how few there are, what is lost without them, what training them alone gives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveate.analysis._prompts import corrupted, first_answers, last_logits, padded
from foveate.analysis.arith_heads import ArithHeads, answer_logits
from foveate.analysis.base import Head
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.hf.ablate import ablate
from foveate.hf.parts import head_logits, run
from foveate.hf.weights import only_heads
from foveate.tasks.arithmetic import arithmetic
from foveate.tasks.prompt import Prompt, draw
from foveate.tasks.train import fit

CLAIM = "few heads carry operands to the answer, and training these improves sums more than others"

_TOP, _STEPS, _BATCH, _TEXT = 8, 8, 4, 128


def measure() -> Outcome:
    """One-digit sums after three solved ones: effects, knock-out by mean, training of slices.

    Every step of training is on sums of its own, none of which is among those judged.
    """
    model, tokenizer = loaded()
    asked = arithmetic(tokenizer, rows=8, seed=0, shots=3)
    fresh = arithmetic(tokenizer, rows=16, seed=1, shots=3)
    judged = {_question(prompt) for prompt in fresh}
    others = arithmetic(tokenizer, rows=2 * _STEPS * _BATCH, seed=2, shots=3)
    seen = [prompt for prompt in others if _question(prompt) not in judged]
    record = ArithHeads()(model, asked)
    ranked = record.ranked()
    chosen = {
        "best": ranked[:_TOP],
        "random": draw(ranked[_TOP:], _TOP, torch.Generator().manual_seed(0)),
    }
    figures = {"share of key heads": len(ArithHeads().key_heads(record)) / len(ranked)}
    lost = {name: _knocked_out(fresh, heads) for name, heads in chosen.items()}
    figures |= {f"logit lost without {_TOP} {name}": value for name, value in lost.items()}
    before = _loss(fresh)
    figures["loss of sums"] = before
    gained = {}
    for name, heads in chosen.items():
        after, forgotten = _trained(seen, fresh, heads)
        gained[name] = before - after
        figures[f"loss of sums gained, {name}"] = before - after
        figures[f"loss of text lost, {name}"] = forgotten
    few = figures["share of key heads"] < 0.05
    return Outcome(figures, few and all(x["best"] > max(x["random"], 0.0) for x in (lost, gained)))


def _question(prompt: Prompt) -> str:
    """The sum that is asked, without the solved ones."""
    return prompt.text.rpartition("\n")[2]


def _knocked_out(prompts: list[Prompt], heads: list[Head]) -> float:
    """What the answers' logits lose when heads give their mean over the counterfactuals."""
    model, _ = loaded()
    plain = answer_logits(model, prompts)
    with ablate(model, heads, "mean", reference=padded(corrupted(prompts))):
        return float((plain - answer_logits(model, prompts)).mean())


def _loss(prompts: list[Prompt]) -> float:
    """Nats of the answers' first tokens."""
    return float(cross_entropy(last_logits(loaded()[0], prompts), first_answers(prompts)))


@torch.no_grad()
def _text_loss() -> float:
    model, ids = loaded()[0], text_ids(_TEXT + 1)
    return float(cross_entropy(head_logits(model, run(model, ids[:, :-1])[0]), ids[0, 1:]))


def _trained(seen: list[Prompt], fresh: list[Prompt], heads: list[Head]) -> tuple[float, float]:
    """Loss of fresh sums, and what the loss of text rose, after training; the model stays as is."""
    model, _ = loaded()

    def loss(step: int) -> Tensor:
        batch = seen[step * _BATCH : (step + 1) * _BATCH]
        logits = head_logits(model, run(model, padded(batch))[:, -1])
        return cross_entropy(logits, first_answers(batch))

    before = _text_loss()
    with only_heads(model, heads) as parameters:
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            fit(parameters, loss, steps=_STEPS, lr=3e-4, weight_decay=0.0)
            return _loss(fresh), _text_loss() - before
        finally:
            with torch.no_grad():
                for parameter, old in zip(parameters, kept, strict=True):
                    parameter.copy_(old)
