"""How much a plan loses on a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.bench import needles
from foveate.bench.runs import answer, divergence, perplexity
from foveate.hf.attach import attach
from foveate.hf.parts import body, head_logits

_SCORED, _DEPTHS = 512, (0.1, 0.3, 0.5, 0.7, 0.9)


class Judge:
    """Losses in percent on ids (1, L + 1) against dense attention, which is run once.

    perplexity: its rise; kl: 100 × the KL in nats over the last 512 positions; needles: how many
    of those that dense attention finds in this text are lost.
    """

    def __init__(self, model: Any, tokenizer: Any, ids: Tensor, metric: str) -> None:
        self.model, self.tokenizer, self.metric = model, tokenizer, metric
        self.ids, self.next = ids[:, :-1], ids[0, 1:]
        self._dense: Any = None

    def loss(self, prefill: Any) -> float:
        """The loss of a plan for prefill."""
        if self._dense is None:
            self._dense = self._seen(None)
        seen, dense = self._seen(prefill), self._dense
        if self.metric == "perplexity":
            return 100 * (seen / dense - 1)
        if self.metric == "kl":
            return 100 * divergence(dense, seen)[0]
        if not sum(dense):
            raise ValueError(
                "dense attention finds no needle in this text: judge by another metric"
            )
        return 100 * sum(a and not b for a, b in zip(dense, seen, strict=True)) / sum(dense)

    @torch.inference_mode()
    def _seen(self, prefill: Any) -> Any:
        """What the metric looks at: perplexity, logits of the last positions, or needles found."""
        if self.metric == "needles":
            return [self._found(prefill, depth) for depth in _DEPTHS]
        with attach(self.model, prefill=prefill):
            hidden = body(self.model)(self.ids, use_cache=False).last_hidden_state[0]
        if self.metric == "perplexity":
            return perplexity(self.model, hidden, self.next)
        return head_logits(self.model, hidden[-_SCORED:])

    def _found(self, prefill: Any, depth: float) -> bool:
        key = needles.pass_key(depth, 0)
        length = self.ids.shape[1] - needles.ANSWER_TOKENS
        prompt = needles.needle_prompt(self.tokenizer, self.ids, depth, key, length)
        said = answer(self.model, {"prefill": prefill}, prompt, needles.ANSWER_TOKENS)
        return needles.answered(self.tokenizer.decode(said, skip_special_tokens=True)) == key
