"""What claims about decoding share: one dense prefill, decoded after under many mechanisms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.attention.base import Record
from foveate.bench.claims._builtin import loaded
from foveate.hf.attach import attach
from foveate.hf.parts import body, head_logits


class Prompt:
    """Tokens (1, n) that the built-in model has read densely."""

    @torch.inference_mode()
    def __init__(self, ids: Tensor) -> None:
        self.model, _ = loaded()
        with attach(self.model):
            self.cache = body(self.model)(ids, use_cache=True).past_key_values

    @torch.inference_mode()
    def decode(
        self,
        then: Tensor,
        mechanism: Any,
        *,
        record: Callable[[Record], None] | None = None,
        after: Callable[[Any], None] | None = None,
    ) -> Tensor:
        """Logits (S, vocabulary) of the tokens `then` (1, S) fed one by one under a mechanism.

        `record` is told what every call did, `after` is shown the cache after every step.
        """
        cache, logits = copy.deepcopy(self.cache), []
        with attach(self.model, decode=mechanism) as attached:
            attached.record = record
            for token in then.split(1, 1):
                out = body(self.model)(token, past_key_values=cache, use_cache=True)
                logits.append(head_logits(self.model, out.last_hidden_state[0]))
                if after is not None:
                    after(cache)
        return torch.cat(logits)


def sparse_mass(prompt: Prompt, then: Tensor, mechanism: Any) -> tuple[Tensor, float]:
    """Logits of decoded tokens, and the mean mass kept by the calls that did not read all."""
    kept: list[float] = []

    def note(record: Record) -> None:
        if record.density < 1:
            kept.append(record.retained_mass)

    logits = prompt.decode(then, mechanism, record=note)
    return logits, sum(kept) / max(len(kept), 1)
