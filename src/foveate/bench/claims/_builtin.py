"""What claims about real models share: the built-in model on the built-in text, judged."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.bench.runs import Recording, divergence, perplexity
from foveate.hf.attach import attach
from foveate.hf.builtin import load_builtin
from foveate.hf.parts import body, head_logits
from foveate.hf.text import builtin_text, encode


class Judged(NamedTuple):
    """A prefill against the dense one: perplexity of all tokens, the rest as `compare` has it.

    kl (nats) and top1 are means over the last `scored` positions; density and retained_mass are
    None where the mechanism was dense.
    """

    perplexity: float
    kl: float
    top1: float
    density: float | None
    retained_mass: float | None


@cache
def loaded() -> tuple[Any, Any]:
    """The built-in model and its tokenizer, loaded once."""
    return load_builtin()


@cache
def text_ids(tokens: int, skip: int = 0) -> Tensor:
    """Tokens [skip, skip + tokens) of the built-in text, (1, tokens)."""
    return encode(loaded()[1], builtin_text(), skip + tokens)[:, skip:]


@torch.inference_mode()
def judge(tokens: int, mechanism: Any, scored: int = 256) -> Judged:
    """Quality of a prefill of `tokens` of the text under a mechanism (a spec, plan or object)."""
    model, _ = loaded()
    ids, dense = text_ids(tokens + 1), dense_logits(tokens, scored)
    record = Recording(-1, 0)
    with attach(model, prefill=mechanism) as attached:
        attached.record = record
        hidden = body(model)(ids[:, :-1], use_cache=False).last_hidden_state[0]
    loss = perplexity(model, hidden, ids[0, 1:])
    kl, top1 = divergence(dense, head_logits(model, hidden[-scored:]))
    mass = record.mean("retained_mass", "prefill")
    return Judged(loss, kl, top1, record.mean("density", "prefill"), mass)


@cache
@torch.inference_mode()
def dense_logits(tokens: int, scored: int) -> Tensor:
    """Logits (scored, vocabulary) of the last positions under dense attention."""
    model, _ = loaded()
    hidden = body(model)(text_ids(tokens + 1)[:, :-1], use_cache=False).last_hidden_state[0]
    return head_logits(model, hidden[-scored:])
