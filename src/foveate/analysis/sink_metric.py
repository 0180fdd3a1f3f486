"""When Attention Sink Emerges in Language Models: An Empirical View (2024, paper 235)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.analysis._columns import column_means, first_to_others, left_aligned, mean_cosines
from foveate.analysis.base import Record, describe, stacked
from foveate.hf.parts import Inputs, real_tokens, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register


@register(
    Card(
        name="sink_metric",
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        claim="language models have attention sinks; without normalised weights they have none",
        kind="analysis",
        family="analysis",
        year=2024,
        paper=235,
        pretrained="exact",
        cost="two further attention passes",
        confidence="high",
    )
)
@dataclass(frozen=True, kw_only=True)
class SinkMetric:
    """Which positions are sinks: those whose mean weight over the rows that see them exceeds eps.

    By layer, head and position (counted from a text's first real token): `importance`, that mean
    weight, over the texts, and `share`, of the texts in which the position is a sink. By layer and
    head: `sink`, the share of the first position, whose mean over all heads is the paper's metric,
    and `elsewhere`, that of the others but the last `late`, which few rows see; `cosine` of the
    first key with the queries and `cosine_others` of the other keys. The first token's norm over
    the mean of the others': `residual` of the stream that enters a layer, `key` and `value` by kv
    head. The paper takes texts of 64 tokens.
    """

    eps: float = 0.3
    late: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {self.eps}")
        if self.late < 0:
            raise ValueError(f"late must be at least 0, got {self.late}")

    @torch.no_grad()
    def __call__(self, model: Any, inputs: Inputs) -> Record:
        """Of a model on token ids (B, L) or a tokenizer's batch; ValueError below 2 tokens."""
        real = real_tokens(inputs)
        if int(real.sum(1).min()) < 2:
            raise ValueError("sink_metric needs texts of at least 2 tokens")
        found: dict[str, list[Tensor]] = {"residual": []}

        def attention(seen: Seen) -> None:
            for name, value in self.of_layer(seen).items():
                found.setdefault(name, []).append(value)

        def block_in(layer: int, x: Tensor) -> None:
            found["residual"].append(first_to_others(x.norm(dim=-1), real).mean(0))

        with watch(model, attention=attention, block_in=block_in):
            run(model, inputs)
        values = {name: stacked(rows) for name, rows in found.items()}
        axes = {name: ("layer", "head", "position")[: x.dim()] for name, x in values.items()}
        axes |= dict.fromkeys(("key", "value"), ("layer", "kv_head"))
        about = describe(model, inputs, eps=self.eps, late=self.late)
        return Record("sink_metric", values, axes, "sink", about)

    def of_layer(self, seen: Seen) -> dict[str, Tensor]:
        """Statistics of one layer by head, or head and position."""
        real = seen.real_rows
        weight = left_aligned(column_means(seen), real)
        cosine = left_aligned(mean_cosines(seen), real)
        counted = left_aligned(real, real)[:, None]
        after = torch.arange(counted.shape[-1], device=real.device) > 0
        early = counted.flip(-1).cumsum(-1).flip(-1) > self.late
        share = _mean(weight > self.eps, counted, (0,))
        return {
            "importance": _mean(weight, counted, (0,)),
            "share": share,
            "sink": share[:, 0],
            "elsewhere": _mean(weight > self.eps, counted & after & early, (0, 2)),
            "cosine": cosine[..., 0].mean(0),
            "cosine_others": _mean(cosine, counted & after, (0, 2)),
            "key": first_to_others(seen.k.norm(dim=-1), real).mean(0),
            "value": first_to_others(seen.v.norm(dim=-1), real).mean(0),
        }


def importance(weights: Tensor, *, rescale: bool = True) -> Tensor:
    """Mean weight (…, L) that keys get from the rows that see them, of causal maps (…, L, L).

    Rows are first brought to sum 1, without which weights that are not normalised say nothing of
    sinks; rows that sum to 0 stay.
    """
    length = weights.shape[-1]
    if weights.dim() < 2 or weights.shape[-2] != length:
        raise ValueError(f"weights must be causal maps (…, L, L), got {tuple(weights.shape)}")
    if rescale:
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1)
    return weights.sum(-2) / torch.arange(length, 0, -1, device=weights.device)


def _mean(x: Tensor, where: Tensor, over: tuple[int, ...]) -> Tensor:
    """Mean of x where it counts; NaN where nothing does."""
    return (x * where).sum(over) / (where.expand_as(x)).sum(over)
