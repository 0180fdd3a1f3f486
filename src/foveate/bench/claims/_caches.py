"""What claims about cache policies share: a prompt compressed, the text after it predicted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.runs import divergence
from foveate.hf.attach import attach
from foveate.hf.layers import Stateful
from foveate.hf.parts import body, head_logits


class Judged(NamedTuple):
    """Means over texts: perplexity of the tokens after the prompt, the rest against a full cache.

    kl in nats; share is that of the bytes a full cache of the prompt holds.
    """

    perplexity: float
    kl: float
    top1: float
    share: float


def judge(
    policy: Any, prompt: int, then: int, skips: Sequence[int] = (0,), *, step: int | None = None
) -> Judged:
    """How a policy serves: `prompt` tokens compressed at once, `then` scored after.

    These come `step` tokens a call, all in one by default. The texts start `skips` tokens into the
    built-in text.
    """
    step = then if step is None else step
    found = torch.zeros(4, dtype=torch.float64)
    for skip in skips:
        logits, held = _after(policy, prompt, then, skip, step)
        full, whole = _dense(prompt, then, skip, step)
        targets = text_ids(prompt + then + 1, skip)[0, prompt + 1 :]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        figures = (float(loss), *divergence(full, logits), held / whole)
        found += torch.tensor(figures, dtype=torch.float64)
    loss, *others = (found / len(skips)).tolist()
    return Judged(float(torch.tensor(loss).exp()), *others)


@cache
def _dense(prompt: int, then: int, skip: int, step: int) -> tuple[Tensor, int]:
    return _after(None, prompt, then, skip, step)


@torch.inference_mode()
def _after(policy: Any, prompt: int, then: int, skip: int, step: int) -> tuple[Tensor, int]:
    """Logits (then, vocabulary) of the tokens after the prompt, bytes held before them."""
    model, _ = loaded()
    ids = text_ids(prompt + then + 1, skip)[:, : prompt + then]
    with attach(model, cache=policy):
        store = body(model)(ids[:, :prompt], use_cache=True).past_key_values
        held = sum(x.nbytes() for x in store.layers if isinstance(x, Stateful))
        states = [
            body(model)(part, past_key_values=store, use_cache=True).last_hidden_state[0]
            for part in ids[:, prompt:].split(step, 1)
        ]
    return head_logits(model, torch.cat(states)), held
