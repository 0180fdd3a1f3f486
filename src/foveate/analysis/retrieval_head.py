"""Retrieval Head Mechanistically Explains Long-Context Factuality (2024, paper 23)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.analysis.base import Record, describe
from foveate.hf.parts import head_logits, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register


@register(
    Card(
        name="retrieval_head",
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        claim="few heads copy what a long context is asked for; without them recall breaks",
        kind="analysis",
        family="analysis",
        year=2024,
        paper=23,
        pretrained="exact",
        cost="a pass over each prompt with its answer, and a row of every map for a token of it",
        confidence="high",
    )
)
@dataclass(frozen=True, kw_only=True)
class RetrievalHead:
    """How much of an answer each head finds in the context by its strongest weight.

    A row that predicts a token is a hit when the head's strongest key lies in the prompt's span
    "answer" and holds that token. `retrieval` is the share of the span's positions that were hit,
    or with `distinct` off the number of hits over its length, which may exceed 1; `active` the
    share of prompts with a hit. Both are means over the prompts that count: those where the model
    gives more than the share `recall` of the answer's tokens (None: all); NaN when none does.
    `recalled` is that share by prompt.

    The answer's rows are read in one pass over prompt and answer. With `decode` they are those of
    what the model itself says, greedily, up to `new_tokens` tokens or one of `stop` (by default
    the model's own end of text).
    """

    decode: bool = False
    new_tokens: int = 50
    stop: tuple[int, ...] = ()
    recall: float | None = 0.5
    distinct: bool = True

    def __post_init__(self) -> None:
        ops.check_block("new_tokens", self.new_tokens)
        if self.recall is not None and not 0 <= self.recall < 1:
            raise ValueError(f"recall must be in [0, 1) or None, got {self.recall}")

    @torch.no_grad()
    def __call__(self, model: Any, prompts: Sequence[Any]) -> Record:
        """Of a model on prompts with ids (1, L), answer (n,) and a span "answer"; else ValueError.

        The prompts of `foveate.tasks.needle_kv` are such.
        """
        if not prompts:
            raise ValueError("retrieval_head needs at least one prompt")
        scores, recalled = [], []
        for prompt in prompts:
            if "answer" not in prompt.spans:
                raise ValueError(f"a prompt has no span 'answer', only {sorted(prompt.spans)}")
            ids = self._decoded(model, prompt.ids) if self.decode else prompt.with_answer()
            strongest, said = _follow(model, ids, prompt.ids.shape[1])
            told = ids[0, prompt.ids.shape[1] :]
            scores.append(
                found(strongest, told, ids[0], prompt.spans["answer"], distinct=self.distinct)
            )
            recalled.append(torch.isin(prompt.answer.unique(), said).float().mean())
        by_prompt, recall = torch.stack(scores), torch.stack(recalled)
        counted = by_prompt if self.recall is None else by_prompt[recall > self.recall]
        values = {
            "retrieval": counted.mean(0),
            "active": (counted > 0).float().mean(0),
            "recalled": recall,
        }
        heads = ("layer", "head")
        axes = {"retrieval": heads, "active": heads, "recalled": ("prompt",)}
        about = describe(model, prompts=len(prompts), counted=len(counted), decode=self.decode)
        return Record("retrieval_head", values, axes, "retrieval", about)

    def _decoded(self, model: Any, ids: Tensor) -> Tensor:
        """A prompt and what the model says after it, (1, L + n)."""
        options: dict[str, Any] = {"eos_token_id": list(self.stop)} if self.stop else {}
        said: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return said


def found(
    strongest: Tensor,
    told: Tensor,
    ids: Tensor,
    span: tuple[int, int],
    *,
    distinct: bool = True,
) -> Tensor:
    """Share (…) of a span [a, b) of ids (L,) that rows predicting told (n,) hit.

    strongest (…, n) are the keys with the largest weight. A hit lies in the span and holds the
    token; without `distinct` every hit counts, not every position that was hit.
    """
    a, b = span
    hit = (a <= strongest) & (strongest < b) & (ids[strongest] == told)
    if not distinct:
        return hit.sum(-1) / (b - a)
    at = torch.arange(a, b, device=strongest.device)
    return ((strongest[..., None] == at) & hit[..., None]).any(-2).float().mean(-1)


@torch.no_grad()
def answer_accuracy(model: Any, prompts: Sequence[Any]) -> float:
    """Share of the tokens of all answers that the model predicts, each after the right ones."""
    right = [
        head_logits(model, run(model, p.with_answer())[0, p.ids.shape[1] - 1 : -1]).argmax(-1)
        == p.answer
        for p in prompts
    ]
    return float(torch.cat(right).float().mean())


def _follow(model: Any, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Of the rows that predict ids from `start` on: strongest keys (layers, Hq, n), tokens (n,)."""
    rows, strongest = torch.arange(start - 1, ids.shape[1] - 1, device=ids.device), []

    def attention(seen: Seen) -> None:
        strongest.append(seen.rows(rows)[0].argmax(-1))

    with watch(model, attention=attention):
        hidden = run(model, ids)
    return torch.stack(strongest), head_logits(model, hidden[0, rows]).argmax(-1)
