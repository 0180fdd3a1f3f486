"""On the Existence and Behaviour of Secondary Attention Sinks (2025, paper 186)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.analysis._columns import column_means, left_aligned
from foveate.analysis.base import Record, describe, stacked
from foveate.hf.parts import Inputs, real_tokens, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register

# Channels without which `cosine_rest` looks at streams.
_MASSIVE = 3


@register(
    Card(
        name="secondary_sinks",
        title="On the Existence and Behaviour of Secondary Attention Sinks",
        claim="some layers have further sinks, which a feed-forward part makes like the first",
        kind="analysis",
        family="analysis",
        year=2025,
        paper=186,
        pretrained="exact",
        cost="one further attention pass",
        confidence="medium",
    )
)
@dataclass(frozen=True, kw_only=True)
class SecondarySinks:
    """Tokens whose stream points, for some layers, where the first token's does.

    A token is a candidate in a layer when the |cosine| of the stream that enters it with the first
    token's exceeds `cosine`; embeddings do not count. Its `onset` is the first such layer (-1:
    none), its `lifetime` the number of layers in a row from there; it is `secondary` when that
    lifetime is more than `noise` and less than `longest` (None: the layers after the first, where
    the first token is one). With `within_norm` only layers between the largest rise and the
    largest fall of the first token's norm count.

    By text and position (from the first real token): the three, `strength`, its mean weight over
    the rows that see it, over all heads and its lifetime, and of what the feed-forward part before
    the onset gave it `formed`, the cosine with the first token's stream at the onset, and
    `formed_norm`; NaN for no candidate. By layer, too: `cosine`, `cosine_rest` (without the three
    channels that are largest in the first token) and `importance` (the mean weight).
    """

    cosine: float = 0.9
    noise: int = 4
    longest: int | None = None
    within_norm: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.cosine < 1:
            raise ValueError(f"cosine must be in (0, 1), got {self.cosine}")
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")
        if self.longest is not None:
            ops.check_block("longest", self.longest)

    @torch.no_grad()
    def __call__(self, model: Any, inputs: Inputs) -> Record:
        """Of a model on token ids (B, L) or a tokenizer's batch."""
        real = real_tokens(inputs)
        found: dict[str, list[Tensor]] = {}

        def keep(name: str, x: Tensor) -> None:
            found.setdefault(name, []).append(left_aligned(x, real))

        def attention(seen: Seen) -> None:
            keep("importance", column_means(seen).mean(1))

        def block_in(layer: int, x: Tensor) -> None:
            first = first_vectors(x, real)
            largest = first.abs().topk(_MASSIVE, -1).indices.expand(-1, x.shape[1], -1)
            keep("cosine", torch.cosine_similarity(x, first, dim=-1))
            rest, base = x.scatter(2, largest, 0.0), first.scatter(2, largest[:, :1], 0.0)
            keep("cosine_rest", torch.cosine_similarity(rest, base, dim=-1))
            keep("norm", x.norm(dim=-1))
            if layer:
                keep("formed", torch.cosine_similarity(given[0], first, dim=-1))
                keep("formed_norm", given[0].norm(dim=-1))

        def mlp_out(layer: int, x: Tensor) -> None:
            given[:] = [x]

        given: list[Tensor] = []
        with watch(model, attention=attention, block_in=block_in, mlp_out=mlp_out):
            run(model, inputs)
        values = {name: stacked(rows) for name, rows in found.items()}
        values |= self._of_tokens(values, left_aligned(real, real).cpu())
        del values["norm"]
        names = ("layer", "text", "position")
        axes = {name: names[-x.dim() :] for name, x in values.items()}
        about = describe(model, inputs, cosine=self.cosine, noise=self.noise)
        return Record("secondary_sinks", values, axes, "", about)

    def _of_tokens(self, values: dict[str, Tensor], real: Tensor) -> dict[str, Tensor]:
        """What is known of every token (text, position) from values by layer."""
        candidate = (values["cosine"].abs() > self.cosine) & real
        candidate[0] = False
        if self.within_norm:
            candidate &= risen(values["norm"][..., :1])
        onset, lifetime = first_run(candidate)
        layers = torch.arange(len(candidate))[:, None, None]
        alive = (layers >= onset) & (layers < onset + lifetime)
        none = onset < 0
        at = (onset - 1).clamp_min(0)[None]
        longest = len(candidate) - 1 if self.longest is None else self.longest
        by_token = {
            "strength": (values["importance"] * alive).sum(0) / lifetime,
            "formed": values["formed"].gather(0, at)[0].masked_fill(none, float("nan")),
            "formed_norm": values["formed_norm"].gather(0, at)[0].masked_fill(none, float("nan")),
        }
        secondary = (lifetime > self.noise) & (lifetime < longest)
        return by_token | {"onset": onset, "lifetime": lifetime, "secondary": secondary}


def first_run(candidate: Tensor) -> tuple[Tensor, Tensor]:
    """First layer (…) of candidate (layers, …) that is true, -1 for none, and how many follow."""
    ever = candidate.any(0)
    onset = candidate.int().argmax(0)
    begun = torch.arange(len(candidate)).view(-1, *[1] * ever.dim()) >= onset
    ended = (begun & ~candidate).int().cumsum(0) > 0
    return onset.masked_fill(~ever, -1), (begun & ~ended & ever).sum(0)


def risen(norm: Tensor) -> Tensor:
    """Layers from the largest rise of a norm (layers, …) to its largest fall, if any."""
    change = norm.diff(dim=0)
    layers = torch.arange(len(norm)).view(-1, *[1] * (norm.dim() - 1))
    fall = torch.where(change.amin(0) < 0, change.argmin(0), len(change))
    return (layers > change.argmax(0)) & (layers <= fall)


def first_vectors(x: Tensor, real: Tensor) -> Tensor:
    """Of streams (B, L, width) those of every text's first real token, (B, 1, width)."""
    at = real.int().argmax(1).view(-1, 1, 1).expand(-1, 1, x.shape[2])
    return x.gather(1, at)
