"""Entropy, span, sparsity, locality, sinks and rank collapse: what attention does, in numbers."""

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

# Sampled rows whose weights are held at once, and tokens in float64.
_CHUNK, _TOKENS = 16, 512


@register(
    Card(
        name="core_stats",
        title="Core statistics of attention (baseline)",
        claim="pure attention loses rank doubly exponentially with depth",
        kind="analysis",
        family="analysis",
        patterns=("noncausal self", "causal self"),
        pretrained="exact",
        cost="two further attention passes, and `rows` rows of every map, a layer at a time",
        confidence="high",
    )
)
@dataclass(frozen=True, kw_only=True)
class CoreStats:
    """Statistics of every head on a text, without a map; means over the rows of real tokens.

    By head: `entropy` over the logarithm of the number of visible keys (1: uniform) and `sink`
    (mean weight of the first key); from at most `rows` rows, evenly spaced: `span` (exp of the
    entropy, in keys), `participation` (1 / Σp²), `sparsity` (share of the visible keys that hold
    the mass 1 - eps), `locality` (mean distance), `diagonal` and `previous` (weight of the own
    and of the previous token) and `largest` (weight). Rows that see one key alone are left out.
    By layer: `diversity` (square root of the Jensen-Shannon divergence among its heads), and of
    the stream that enters it `collapse` (‖X - mean‖ / ‖X‖), `cosine` (mean of two tokens) and
    `rank` (exp of the entropy of its singular values). NaN where no row counts.
    """

    eps: float = 0.05
    rows: int = 256

    def __post_init__(self) -> None:
        ops.check_block("rows", self.rows)
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {self.eps}")

    @torch.no_grad()
    def __call__(self, model: Any, inputs: Inputs) -> Record:
        """Of a model on token ids (B, L) or a tokenizer's batch; ValueError below 2 tokens."""
        real = real_tokens(inputs)
        if int(real.sum(1).max()) < 2:
            raise ValueError("core_stats needs a text of at least 2 tokens")
        found: dict[str, list[Tensor]] = {}

        def attention(seen: Seen) -> None:
            for name, value in self.of_layer(seen).items():
                found.setdefault(name, []).append(value)

        def block_in(layer: int, x: Tensor) -> None:
            for name, value in of_stream(x[real]).items():
                found.setdefault(name, []).append(value)

        with watch(model, attention=attention, block_in=block_in):
            run(model, inputs)
        values = {name: stacked(rows) for name, rows in found.items()}
        axes = {name: ("layer", "head")[: x.dim()] for name, x in values.items()}
        about = describe(model, inputs, eps=self.eps, rows=self.rows)
        return Record("core_stats", values, axes, "entropy", about)

    def of_layer(self, seen: Seen) -> dict[str, Tensor]:
        """Statistics of the heads (Hq,) of one layer, and their `diversity` ()."""
        keys, _ = seen.counts()
        several = (keys > 1) & seen.real_rows[:, None]
        entropy = seen.row_stats().entropy / keys.clamp_min(2).log()
        weight = left_aligned(column_means(seen), seen.real_rows)
        out = {"entropy": _mean(entropy, several), "sink": weight[..., 0].mean(0)}
        at = torch.linspace(0, seen.q.shape[2] - 1, min(self.rows, seen.q.shape[2]))
        sums: dict[str, Tensor] = {}
        for some in at.round().long().unique().to(seen.q.device).split(_CHUNK):
            counted = several[:, :, some]
            for name, value in self._of_rows(seen.rows(some), some, keys[:, :, some]).items():
                # A statistic of pairs of heads has a row axis but no head axis.
                where = counted if value.dim() == 3 else counted[:, 0]
                part = torch.stack([(value * where).sum((0, -1)), where.sum((0, -1))])
                sums[name] = sums.get(name, 0.0) + part
        return out | {name: total / count for name, (total, count) in sums.items()}

    def _of_rows(self, p: Tensor, at: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """Of weights (B, Hq, n, Lk) of the queries `at`: by head (B, Hq, n), by layer (B, n)."""
        distance = (at[:, None] - torch.arange(p.shape[3], device=p.device)).abs()
        own, before = (x[:, None].expand(*p.shape[:3], 1) for x in (at, (at - 1).clamp_min(0)))
        entropy = -torch.xlogy(p, p).sum(-1)
        held = p.sort(-1, descending=True).values.cumsum(-1)
        mixture = -torch.xlogy(p.mean(1), p.mean(1)).sum(-1)
        return {
            "span": entropy.exp(),
            "participation": 1 / p.square().sum(-1).clamp_min(1e-30),
            "sparsity": (1 + (held < 1 - self.eps).sum(-1)) / keys.clamp_min(1),
            "locality": (p * distance).sum(-1),
            "diagonal": p.gather(3, own)[..., 0],
            "previous": p.gather(3, before)[..., 0],
            "largest": p.amax(-1),
            "diversity": (mixture - entropy.mean(1)).clamp_min(0).sqrt(),
        }


def of_stream(x: Tensor) -> dict[str, Tensor]:
    """Rank collapse of tokens (n, width): `collapse`, `cosine`, `rank`."""
    n, width = x.shape
    sums = x.new_zeros(2, width, dtype=torch.float64)
    gram = x.new_zeros(width, width, dtype=torch.float64)
    for part in x.split(_TOKENS):  # in float64, but never all of them
        wide = part.double()
        unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-30)
        sums += torch.stack((wide.sum(0), unit.sum(0)))
        gram += wide.T @ wide
    total, apart = gram.trace(), (gram - torch.outer(sums[0], sums[0]) / n).trace()
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum()
    return {
        "collapse": (apart.clamp_min(0) / total).sqrt(),
        "cosine": (sums[1].square().sum() - n) / (n * (n - 1)),
        "rank": (-torch.xlogy(share, share).sum()).exp(),
    }


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """Mean (Hq,) over batch and rows of (B, Hq, L), where it counts."""
    return (x * where).sum((0, 2)) / where.sum((0, 2))
