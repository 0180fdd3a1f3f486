"""RelayAttention (2024, paper 214): a batch behind one long prompt decodes in half the time."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.hf.attach import attach
from foveate.hf.layers import Stateful
from foveate.hf.parts import body, head_logits
from foveate.hf.prefix import prefix
from foveate.hf.tails import Prefix

CLAIM = (
    "8 requests behind 4,096 shared tokens decode at least twice as fast as with a cache of their "
    "own each, with the same logits"
)

_SHARED, _BATCH, _TAIL, _STEPS = 4096, 8, 32, 10


@torch.inference_mode()
def measure() -> Outcome:
    """Tokens a second over plain transformers, step by step in turn; logits; bytes held."""
    model, _ = loaded()
    system = prefix(model, text_ids(_SHARED))
    tails = text_ids(_BATCH * (_TAIL + _STEPS), skip=_SHARED).view(_BATCH, -1)
    relay, plain = DynamicCache(), DynamicCache()
    for index, shared in enumerate(system.layers):
        plain.update(shared.k.repeat(_BATCH, 1, 1, 1), shared.v.repeat(_BATCH, 1, 1, 1), index)
    gap, ratios, at = 0.0, [], 0
    for turn in range(_STEPS + 1):
        now = tails[:, at : at + (_TAIL if turn == 0 else 1)]
        at += now.shape[1]
        ways: list[tuple[Any, Prefix | None]] = [(plain, None), (relay, system)]
        order = ways[:: (-1) ** turn]
        done = {held is None: _step(model, now, cache, held) for cache, held in order}
        (slow, want), (fast, got) = done[True], done[False]
        gap = max(gap, float(((got - want).abs() / (1 + want.abs())).max()))
        if turn > 1:  # the requests themselves and a step to warm up do not count
            ratios.append(slow / fast)
    own = sum(x.nbytes() for x in relay.layers if isinstance(x, Stateful))
    whole = sum(x.keys.nbytes + x.values.nbytes for x in plain.layers)
    figures = {
        "tokens a second, over a cache each": median(ratios),
        "largest relative difference of logits": gap,
        "bytes of caches each, over shared": whole / own,
    }
    return Outcome(figures, median(ratios) >= 2 and gap <= 1e-4)


def _step(model: Any, tokens: Tensor, cache: Any, held: Prefix | None) -> tuple[float, Tensor]:
    """Seconds of a call, and its last logits (B, vocabulary)."""
    if held is not None:
        with attach(model, prefix=held):
            return _call(model, tokens, cache)
    return _call(model, tokens, cache)


def _call(model: Any, tokens: Tensor, cache: Any) -> tuple[float, Tensor]:
    start = time.perf_counter()
    hidden = body(model)(tokens, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    logits = head_logits(model, hidden)
    return time.perf_counter() - start, logits
