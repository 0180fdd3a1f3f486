"""Attention Sink in Transformers: sinks used, explained and removed (2026, paper 169)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.analysis._columns import column_means
from foveate.analysis._loss import next_token_loss
from foveate.analysis.base import Record, describe, stacked
from foveate.hf.parts import Inputs, real_tokens
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register


@register(
    Card(
        name="sink_survey",
        title="Attention Sink in Transformers: A Survey on Utilization, Interpretation, and "
        "Mitigation",
        year=2026,
        paper=169,
        claim="first tokens are needed as places for weight, not for what their values say",
        kind="analysis",
        family="analysis",
        pretrained="exact",
        cost="five passes over the text, two of them with a second attention pass",
        confidence="high on the measures; which to take of a survey's many is our choice",
    )
)
@dataclass(frozen=True, kw_only=True)
class SinkSurvey:
    """What the first tokens are worth to a model, as losses (nats a token) under edits.

    `plain`: nothing changed. Used: `window`, every row sees the last `window` tokens alone, and
    `window_sinks`, the first `sinks` too. Explained: `hidden`, no row but their own sees the first
    `sinks`, and `silent`, their weights stay but the values they give to other rows are 0, which
    is softmax with a constant of each row in its denominator in their place. By layer and head
    `mass`, the mean weight of them all, and `moved`, that of the next token while they are hidden.
    """

    window: int = 64
    sinks: int = 1

    def __post_init__(self) -> None:
        ops.check_block("window", self.window)
        ops.check_block("sinks", self.sinks)

    @torch.no_grad()
    def __call__(self, model: Any, inputs: Inputs) -> Record:
        """Of a causal model on token ids (B, L) or a tokenizer's batch.

        Raises ValueError when no text is longer than window and sinks, which would change nothing.
        """
        longest = int(real_tokens(inputs).sum(1).max())
        if longest <= self.window + self.sinks:
            raise ValueError(
                f"sink_survey needs a text of more than {self.window + self.sinks} tokens, "
                f"got {longest}"
            )
        edits: dict[str, Callable[[Seen], Tensor | None]] = {
            "plain": lambda seen: None,
            "window": self._windowed,
            "window_sinks": self._windowed_with_sinks,
            "hidden": self._hidden,
            "silent": self._silent,
        }
        watched = {"plain": ("mass", self._first), "hidden": ("moved", self._next)}
        losses, masses = {}, {}
        for name, edit in edits.items():
            measured, tokens = watched.get(name, ("", None))
            losses[name], found = _pass(model, inputs, edit, tokens)
            if measured:
                masses[measured] = stacked(found)
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(losses, ())
        axes |= dict.fromkeys(masses, ("layer", "head"))
        about = describe(model, inputs, window=self.window, sinks=self.sinks)
        return Record("sink_survey", losses | masses, axes, "mass", about)

    def _first(self, seen: Seen) -> Tensor:
        """Which keys (B, Lk) are the first real ones of their text."""
        number = _numbers(seen)
        return (number > 0) & (number <= self.sinks)

    def _next(self, seen: Seen) -> Tensor:
        """Which key (B, Lk) follows them."""
        return _numbers(seen) == self.sinks + 1

    def _windowed(self, seen: Seen) -> None:
        _restrict(seen, ops.window(self.window))

    def _windowed_with_sinks(self, seen: Seen) -> None:
        _restrict(seen, ops.window(self.window) | ops.padding(self._first(seen)))

    def _hidden(self, seen: Seen) -> None:
        _restrict(seen, ops.window(1) | ops.padding(~self._first(seen)))

    def _silent(self, seen: Seen) -> Tensor:
        first = self._first(seen)[:, None, :, None]
        out, _ = seen.attend(seen.q, seen.k, seen.v.masked_fill(first, 0.0))
        return torch.where(first, seen.out, out)


def _restrict(seen: Seen, rule: ops.Mask) -> None:
    """Let rows see no more than a rule allows."""
    seen.mask = rule if seen.mask is None else seen.mask & rule


def _numbers(seen: Seen) -> Tensor:
    """Numbers (B, Lk) of real keys in their text, from 1 on; 0 of padding."""
    real = seen.real_rows
    return real.cumsum(1) * real


def _pass(
    model: Any,
    inputs: Inputs,
    edit: Callable[[Seen], Tensor | None],
    tokens: Callable[[Seen], Tensor] | None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss () under an edit and, by layer, the mean weight (Hq,) of some tokens."""
    found = []

    def attention(seen: Seen) -> Tensor | None:
        out = edit(seen)
        if tokens is not None:
            found.append((column_means(seen) * tokens(seen)[:, None]).sum(-1).mean(0))
        return out

    with watch(model, attention=attention):
        return torch.tensor(next_token_loss(model, inputs)), found
