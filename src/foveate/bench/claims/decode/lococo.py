"""LoCoCo (2024, paper 128): convolutions learn to fold dropped tokens into a small cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from foveate.attention._trained import InTraining
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.train import train
from foveate.cache.lococo import LoCoCo
from foveate.hf.attach import attach
from foveate.hf.parts import body, head_logits

CLAIM = "trained mixtures in half of the slots predict held-out text better than eviction alone"

_LENGTH, _WINDOWS, _HELD_OUT, _STEPS, _RATE = 512, 24, 8, 24, 0.02
_POLICY = LoCoCo(budget=64, chunk=64)


def measure() -> Outcome:
    """Perplexity of held-out windows of 512 tokens, from 128 on, read in chunks of 64."""
    model, _ = loaded()
    count = _WINDOWS + _HELD_OUT
    ids = text_ids(_LENGTH * count).view(count, _LENGTH)
    taught = train(model, _POLICY, [ids[:_WINDOWS]], steps=_STEPS, lr=_RATE)
    evicting = copy.deepcopy(taught.learner)
    with torch.no_grad():
        evicting.get_parameter("blend").zero_()
    test = ids[_WINDOWS:]
    figures = {
        "perplexity, all tokens": _perplexity(test, None),
        "perplexity, eviction": _perplexity(test, evicting),
        "perplexity, untrained mixtures": _perplexity(test, _POLICY.learner(taught.shape)),
        "perplexity, trained mixtures": _perplexity(test, taught.learner),
        "mean share of the mixtures": float(taught.learner.get_parameter("blend").mean()),
    }
    better = figures["perplexity, trained mixtures"] < figures["perplexity, eviction"]
    return Outcome(figures, better)


@torch.inference_mode()
def _perplexity(windows: Tensor, learner: Any) -> float:
    """Of the windows' tokens from 128 on."""
    model, _ = loaded()
    total = 0.0
    place = None if learner is None else InTraining(learner=learner)
    with attach(model, prefill=place):
        for ids in windows.split(1):
            hidden = body(model)(ids[:, :-1], use_cache=False).last_hidden_state[0, 127:]
            logits = head_logits(model, hidden)
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 128:]))
    return float(torch.tensor(total / len(windows)).exp())
