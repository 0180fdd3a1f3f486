"""Prompts of different lengths in one batch, and where in it their spans are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.analysis.base import stacked
from foveate.hf.parts import head_logits, run
from foveate.hf.watch import Seen, watch


class Prompt(Protocol):
    """What the analyses use of a prompt: tokens (1, L), the answer's (n,), ranges [a, b) of ids."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def answer(self) -> Tensor: ...
    @property
    def spans(self) -> dict[str, tuple[int, int]]: ...
    @property
    def corrupt(self) -> Prompt | None: ...
    def difference(self, logits: Tensor) -> Tensor: ...


def padded(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """A batch of prompts, padded on the left; ValueError when there is none."""
    if not prompts:
        raise ValueError("wanted at least one prompt, got none")
    width = max(prompt.ids.shape[1] for prompt in prompts)
    rows = [pad(prompt.ids, (width - prompt.ids.shape[1], 0)) for prompt in prompts]
    real = [
        pad(torch.ones_like(prompt.ids), (width - prompt.ids.shape[1], 0)) for prompt in prompts
    ]
    return {"input_ids": torch.cat(rows), "attention_mask": torch.cat(real)}


def corrupted(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The counterfactuals of prompts; ValueError for a prompt that has none."""
    others = []
    for i, prompt in enumerate(prompts):
        if prompt.corrupt is None:
            raise ValueError(f"every prompt must have a counterfactual, prompt {i} has none")
        others.append(prompt.corrupt)
    return others


def where(prompts: Sequence[Prompt], *names: str) -> Tensor:
    """Which tokens (B, L) of the padded batch are in spans of these names."""
    width = max(prompt.ids.shape[1] for prompt in prompts)
    out = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in zip(out, prompts, strict=True):
        for name in names:
            a, b = prompt.spans[name]
            row[width - prompt.ids.shape[1] :][a:b] = True
    return out


def first_answers(prompts: Sequence[Prompt]) -> Tensor:
    """First token (B,) of every answer."""
    return torch.stack([prompt.answer[0] for prompt in prompts])


@torch.no_grad()
def last_logits(model: Any, prompts: Sequence[Prompt]) -> Tensor:
    """Logits (B, vocabulary) after every prompt."""
    return head_logits(model, run(model, padded(prompts))[:, -1])


@torch.no_grad()
def looks(
    model: Any, prompts: Sequence[Prompt], spans: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """Mean weight (layer, head) of the last row on spans, under the names that they are given."""
    u = torch.stack([where(prompts, *names) for names in spans.values()], -1).float()
    rows: list[Tensor] = []

    def attention(seen: Seen) -> None:
        last = torch.tensor([seen.q.shape[2] - 1])
        rows.append((seen.rows(last)[:, :, 0] @ u).mean(0))

    with watch(model, attention=attention):
        run(model, padded(prompts))
    return dict(zip(spans, stacked(rows).unbind(-1), strict=True))
