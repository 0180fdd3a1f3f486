"""Circuit Component Reuse Across Tasks in Transformer Language Models (2023, paper 135)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.analysis._prompts import Prompt, corrupted, padded
from foveate.analysis.base import Head, Record, describe
from foveate.hf.ablate import force
from foveate.hf.parts import Parts, head_logits
from foveate.hf.patch import direct_effects, path_patch
from foveate.registry import Card, register


@register(
    Card(
        name="circuit_reuse",
        title="Circuit Component Reuse Across Tasks in Transformer Language Models",
        year=2023,
        paper=135,
        claim="tasks share most of the heads that solve them",
        kind="analysis",
        family="analysis",
        pretrained="exact",
        cost="a pass of a single position for every head; each further step four passes for every "
        "earlier head and way",
        confidence="medium-high",
    )
)
@dataclass(frozen=True, kw_only=True)
class CircuitReuse:
    """The heads that a preference for the answer over wrong options comes through, backwards.

    `effect 0` (layer, head) is what a head's last output of the counterfactuals changes in the
    logit difference, as a mean over prompts; the share `share` of all heads with the largest size
    joins the circuit. In each of `steps` - 1 further steps, `effect i` is that of the heads heard
    by those found last, the largest of the ways `via` (queries "q", keys "k", values "v").
    `found` is 0 for heads outside the circuit, else 1 + the step before which they joined.
    """

    share: float = 0.02
    steps: int = 1
    via: str = "q"

    def __post_init__(self) -> None:
        ops.check_block("steps", self.steps)
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        if not self.via or not set(self.via) <= set("qkv"):
            raise ValueError(f'via must be some of "q", "k" and "v", got {self.via!r}')

    @torch.no_grad()
    def __call__(self, model: Any, prompts: Sequence[Prompt]) -> Record:
        """Of a model on prompts with counterfactuals and wrong options.

        Raises ValueError for a prompt without counterfactual, TypeError as `direct_effects` does.
        """
        parts = Parts(model)
        clean, corrupt = padded(prompts), padded(corrupted(prompts))
        score = differences(prompts)
        effects = [direct_effects(model, clean, corrupt, score).mean(-1)]
        found = torch.zeros(parts.layers, parts.heads)
        last = self._join(effects[0], found, 1)
        for step in range(1, self.steps):
            effects.append(self._heard(model, clean, corrupt, score, last))
            last = self._join(effects[step], found, step + 1)
        values = {f"effect {i}": effect for i, effect in enumerate(effects)}
        values |= {"found": found, "size": effects[0].abs()}
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(values, ("layer", "head"))
        about = describe(model, clean, **asdict(self))
        return Record("circuit_reuse", values, axes, "size", about)

    def _join(self, effect: Tensor, found: Tensor, mark: int) -> list[Head]:
        """Mark the heads of the largest effects that are not in the circuit yet."""
        size = effect.abs().masked_fill(found > 0, 0.0).flatten()
        top = size.topk(max(1, round(self.share * size.numel()))).indices
        heads = [divmod(i, found.shape[1]) for i in top.tolist() if size[i] > 0]
        for head in heads:
            found[head] = mark
        return heads

    def _heard(
        self,
        model: Any,
        clean: dict[str, Tensor],
        corrupt: dict[str, Tensor],
        score: Callable[[Tensor], Tensor],
        receivers: list[Head],
    ) -> Tensor:
        """Effect of every head on the difference by what the receivers hear of it."""
        parts = Parts(model)
        out = torch.zeros(parts.layers, parts.heads)

        def told(senders: list[Head], via: str) -> float:
            hidden = path_patch(model, clean, corrupt, senders, receivers, via=via)
            return float(score(head_logits(model, hidden[:, -1])[None]).mean())

        plain = told([], "q")
        for layer in range(max((layer for layer, _ in receivers), default=0)):
            for head in range(parts.heads):
                changes = [told([(layer, head)], via) - plain for via in self.via]
                out[layer, head] = max(changes, key=abs)
        return out


def circuit(record: Record) -> set[Head]:
    """The heads of the circuit that a record tells."""
    return {(layer, head) for layer, head in record["found"].nonzero().tolist()}


def reused(own: Record, other: Record) -> float:
    """Share of a circuit's heads that another circuit has too."""
    heads = circuit(own)
    return len(heads & circuit(other)) / len(heads)


def differences(prompts: Sequence[Prompt]) -> Callable[[Tensor], Tensor]:
    """Logit differences (n, B) of answers and wrong options from logits (n, B, vocabulary)."""

    def score(logits: Tensor) -> Tensor:
        pairs = zip(prompts, logits.unbind(1), strict=True)
        return torch.stack([prompt.difference(own) for prompt, own in pairs], 1)

    return score


def look_at(
    model: Any, heads: Iterable[Head], prompt: Prompt, *names: str
) -> AbstractContextManager[None]:
    """Within this block the last row of heads attends to the spans alone, all tokens alike.

    Raises KeyError for a span that the prompt lacks, IndexError for a head out of range.
    """
    at = [i for name in names for i in range(*prompt.spans[name])]
    return force(model, heads, dict.fromkeys(at, 1 / len(at)))
