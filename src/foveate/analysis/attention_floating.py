"""Revealing the Attention Floating Mechanism in Masked Diffusion Models (2026, paper 192)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.analysis._columns import column_means, left_aligned, mean_cosines
from foveate.analysis.base import Record, describe, stacked
from foveate.hf.parts import Inputs, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register

_RULES = ("multiple", "margin")


@register(
    Card(
        name="attention_floating",
        title="Revealing the Attention Floating Mechanism in Masked Diffusion Models",
        claim="masked denoisers have anchors that move, and hold less than a causal model's sink",
        kind="analysis",
        family="analysis",
        year=2026,
        paper=192,
        patterns=("noncausal self", "causal self"),
        pretrained="exact",
        cost="two further attention passes a step",
        confidence="medium",
    )
)
@dataclass(frozen=True, kw_only=True)
class AttentionFloating:
    """The anchors of every layer over the steps of a denoiser, and whether they move.

    A key's column is its mean weight over heads and the rows that see it; its anchors are the keys
    whose column exceeds `times` the mean of the columns, or with rule "margin" the mean of the
    others by more than `margin`, and always the largest. By layer and step, means over texts:
    `absorption`, the share of all columns on anchors, `first`, that of the first token, and
    `anchors`, their number. By layer: `overlap`, the Jaccard index of the anchors of two steps in
    a row (NaN for one step), and `wander`, the entropy in nats of where the anchors are over all
    steps. By layer and head, over all steps: correlation of the columns with the keys' norms,
    `norm`, and with their mean cosine to the queries, `angle`. The margin of the paper's released
    code, 3, is above what weights can reach.
    """

    rule: str = "multiple"
    times: float = 3.0
    margin: float = 3.0

    def __post_init__(self) -> None:
        if self.rule not in _RULES:
            raise ValueError(f"rule must be one of {', '.join(_RULES)}, got {self.rule!r}")
        if self.times <= 1:
            raise ValueError(f"times must be above 1, got {self.times}")

    @torch.no_grad()
    def __call__(self, model: Any, steps: Sequence[Inputs]) -> Record:
        """Of the batches that a model reads in turn, all of one shape; ValueError for none."""
        if not steps:
            raise ValueError("attention_floating needs the inputs of at least one step")
        columns: dict[int, list[Tensor]] = {}
        split: dict[int, list[Tensor]] = {}

        def attention(seen: Seen) -> None:
            weight, real = column_means(seen), seen.real_rows
            by = (seen.k.norm(dim=-1).repeat_interleave(seen.q.shape[1] // seen.k.shape[1], 1),)
            pair = [correlation(weight, x, real) for x in (*by, mean_cosines(seen))]
            split.setdefault(seen.layer, []).append(torch.stack(pair).mean(1))
            own = left_aligned(weight.mean(1).masked_fill(~real, float("nan")), real)
            columns.setdefault(seen.layer, []).append(own)

        with watch(model, attention=attention):
            for inputs in steps:
                run(model, inputs)
        layers = [self.of_columns(torch.stack(columns[i])) for i in sorted(columns)]
        values = {name: stacked([layer[name] for layer in layers]) for name in layers[0]}
        pairs = stacked([torch.stack(split[i]).mean(0) for i in sorted(split)])
        values |= {"norm": pairs[:, 0], "angle": pairs[:, 1]}
        axes = {name: ("layer", "step")[: x.dim()] for name, x in values.items()}
        axes |= dict.fromkeys(("norm", "angle"), ("layer", "head"))
        about = describe(model, steps[0], steps=len(steps), rule=self.rule)
        return Record("attention_floating", values, axes, "angle", about)

    def of_columns(self, columns: Tensor) -> dict[str, Tensor]:
        """Of columns (step, text, position) of one layer, NaN where a text has no token."""
        real = ~columns.isnan()
        weight = columns.nan_to_num(0.0)
        anchors = self.anchors(weight, real)
        share = weight / weight.sum(-1, keepdim=True)
        pairs = anchors[1:], anchors[:-1]
        both, either = (pairs[0] & pairs[1]).sum(-1), (pairs[0] | pairs[1]).sum(-1)
        where = anchors.sum(0) / anchors.sum((0, 2))[:, None]
        return {
            "absorption": (share * anchors).sum(-1).mean(1),
            "first": share[..., 0].mean(1),
            "anchors": anchors.sum(-1).float().mean(1),
            "overlap": (both / either).mean(),
            "wander": torch.special.entr(where).sum(-1).mean(),
        }

    def anchors(self, columns: Tensor, real: Tensor) -> Tensor:
        """Which columns (…, L) are anchors, bool; real (…, L) says which there are."""
        count, total = real.sum(-1, keepdim=True), columns.sum(-1, keepdim=True)
        if self.rule == "multiple":
            chosen = columns > self.times * total / count
        else:
            others = (total - columns) / (count - 1).clamp_min(1)
            chosen = columns > others + self.margin
        return (chosen & real).scatter(-1, columns.argmax(-1, keepdim=True), True)


def correlation(x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    """Pearson's correlation (B, H) over the real keys (B, L) of numbers (B, H, L)."""
    counted = real[:, None]
    n = counted.sum(-1, keepdim=True)
    x, y = (
        (z - (z * counted).sum(-1, keepdim=True) / n).double().masked_fill(~counted, 0)
        for z in (x, y)
    )
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
