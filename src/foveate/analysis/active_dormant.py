"""Active-Dormant Attention Heads (2024, paper 54)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.analysis._columns import first_to_others, first_weight
from foveate.analysis._loss import next_token_loss
from foveate.analysis.base import Record, describe, stacked
from foveate.hf.ablate import ablate
from foveate.hf.parts import Inputs, real_tokens, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register

# Rows that see so few keys that what they look at says nothing.
_SKIPPED = 2


@register(
    Card(
        name="active_dormant",
        title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token "
        "Phenomena in LLMs",
        claim="sinks, small values and large streams come together; heads sleep by domain",
        kind="analysis",
        family="analysis",
        year=2024,
        paper=54,
        pretrained="exact",
        cost="two further attention passes a domain",
        confidence="high",
    )
)
@dataclass(frozen=True, kw_only=True)
class ActiveDormant:
    """Which heads rest on the first token on texts of which domain, and what marks that token.

    By layer, head and domain, means over texts and over rows but the first two: `dormancy`, the
    weight of the first real token; `dormant`, whether it exceeds `threshold`; `gap_of_logits`, its
    logit less the mean of the others', before any softcap, over rows that see all before them
    (NaN: none). By layer and domain, the first token's norm over the mean of the others': `peak`
    of the stream that enters, and by kv head `drain` of the values. By layer and head: `activity`,
    how far dormancy differs among the domains.
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {self.threshold}")

    @torch.no_grad()
    def __call__(self, model: Any, domains: Mapping[str, Inputs]) -> Record:
        """Of a model on batches by domain, whose texts have at least 3 tokens; else ValueError."""
        if not domains:
            raise ValueError("active_dormant needs the texts of at least one domain")
        found = [self._of_domain(model, name, inputs) for name, inputs in domains.items()]
        values = {name: torch.stack([x[name] for x in found], -1) for name in found[0]}
        dormancy = values["dormancy"]
        values["dormant"] = dormancy > self.threshold
        values["activity"] = dormancy.amax(-1) - dormancy.amin(-1)
        heads = ("layer", "head", "domain")
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(values, heads)
        axes |= {
            "activity": heads[:2],
            "peak": ("layer", "domain"),
            "drain": ("layer", "kv_head", "domain"),
        }
        about = describe(model, domains=list(domains), threshold=self.threshold)
        return Record("active_dormant", values, axes, "activity", about)

    def _of_domain(self, model: Any, name: str, inputs: Inputs) -> dict[str, Tensor]:
        real = real_tokens(inputs)
        if int(real.sum(1).min()) <= _SKIPPED:
            raise ValueError(f"active_dormant: a text of {name!r} has fewer than 3 tokens")
        found: dict[str, list[Tensor]] = {"peak": []}

        def attention(seen: Seen) -> None:
            for key, value in (
                ("dormancy", first_weight(seen, _SKIPPED).mean(0)),
                ("gap_of_logits", gap_of_logits(seen)),
                ("drain", first_to_others(seen.v.norm(dim=-1), seen.real_rows).mean(0)),
            ):
                found.setdefault(key, []).append(value)

        def block_in(layer: int, x: Tensor) -> None:
            found["peak"].append(first_to_others(x.norm(dim=-1), real).mean(0))

        with watch(model, attention=attention, block_in=block_in):
            run(model, inputs)
        return {key: stacked(rows) for key, rows in found.items()}


def gap_of_logits(seen: Seen) -> Tensor:
    """Mean (Hq,) of a row's logit of the first real key less the mean of the others it sees."""
    keys, _ = seen.counts()
    real = seen.real_rows
    rank = real.cumsum(1)[:, None]
    counted = (keys == rank) & (real[:, None]) & (rank > _SKIPPED)
    group = seen.q.shape[1] // seen.k.shape[1]
    at = real.int().argmax(1).view(-1, 1, 1, 1).expand(-1, seen.k.shape[1], 1, seen.k.shape[3])
    first = seen.k.gather(2, at).repeat_interleave(group, 1)
    # Attention without logits gives the mean key that a row sees, the first among them.
    mean, _ = seen.attend(torch.zeros_like(seen.q), seen.k, seen.k)
    several = keys[..., None].clamp_min(2)
    apart = (first - mean) * several / (several - 1)
    scale = seen.q.shape[3] ** -0.5 if seen.scale is None else seen.scale
    gap = scale * (seen.q * apart).sum(-1)
    return gap.masked_fill(~counted, 0).sum((0, 2)) / counted.sum((0, 2))


def loss_changes(
    model: Any, inputs: Inputs, heads: Iterable[tuple[int, int]], mode: str = "zero"
) -> Tensor:
    """What it costs to put each head (layer, head) alone out of action, in nats a token, (n,).

    Modes are those of `ablate` that need no reference; "sink" leaves the first token alone to look
    at. A head that is dormant on the texts costs nothing.
    """
    plain = next_token_loss(model, inputs)
    changes = []
    for head in heads:
        with ablate(model, [head], mode):
            changes.append(next_token_loss(model, inputs) - plain)
    return torch.tensor(changes)
