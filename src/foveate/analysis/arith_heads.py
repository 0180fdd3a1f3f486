"""Interpreting and Improving Large Language Models in Arithmetic Calculation (2024, paper 53)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.analysis._prompts import (
    Prompt,
    corrupted,
    first_answers,
    last_logits,
    looks,
    padded,
)
from foveate.analysis.base import Head, Record, describe
from foveate.hf.patch import direct_effects
from foveate.registry import Card, register


@register(
    Card(
        name="arith_heads",
        title="Interpreting and Improving Large Language Models in Arithmetic Calculation",
        year=2024,
        paper=53,
        claim="a few heads carry the operands of a sum to its answer",
        kind="analysis",
        family="analysis",
        pretrained="exact",
        cost="two passes over the prompts, and for every head one of a single position",
        confidence="medium-high",
    )
)
@dataclass(frozen=True, kw_only=True)
class ArithHeads:
    """Which heads the answer of a calculation comes through, by path patching.

    By head: `effect`, the change of the logit of the answer's first token when the head's last
    output is that of other operands, over the logit's size, and `difference`, the plain change;
    `size` of the mean effect ranks heads; `operands` and `operator` are mean weights of the last
    row on these tokens. Means over prompts. `threshold` on `size` tells the key heads.
    """

    threshold: float = 0.02

    def __post_init__(self) -> None:
        if self.threshold <= 0:
            raise ValueError(f"threshold must be above 0, got {self.threshold}")

    @torch.no_grad()
    def __call__(self, model: Any, prompts: Sequence[Prompt]) -> Record:
        """Of a model on prompts with counterfactuals and the spans "a", "b" and "operator".

        Raises ValueError for a prompt without counterfactual, TypeError as `direct_effects` does.
        """
        clean, corrupt = padded(prompts), padded(corrupted(prompts))
        answers = first_answers(prompts)

        def answer(logits: Tensor) -> Tensor:
            return logits.gather(-1, answers.expand(len(logits), -1)[..., None])[..., 0]

        change = direct_effects(model, clean, corrupt, answer)
        plain = answer_logits(model, prompts)
        effect = (change / plain.abs()).mean(-1)
        values = {"effect": effect, "difference": change.mean(-1), "size": effect.abs()}
        spans = {"operands": ("a", "b"), "operator": ("operator",)}
        values |= looks(model, prompts, spans)
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(values, ("layer", "head"))
        about = describe(model, clean, **asdict(self))
        return Record("arith_heads", values, axes, "size", about)

    def key_heads(self, record: Record) -> list[Head]:
        """The heads whose effect is above the threshold, the largest first."""
        return [head for head in record.ranked() if record["size"][head] > self.threshold]


def answer_logits(model: Any, prompts: Sequence[Prompt]) -> Tensor:
    """Logit (B,) of the first token of every answer."""
    return last_logits(model, prompts).gather(1, first_answers(prompts)[:, None])[:, 0]
