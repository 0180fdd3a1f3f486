"""Sparse Attention Decomposition Applied to Circuit Tracing (2024, paper 165)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate import ops
from foveate.analysis._bilinear import (
    Scores,
    contributions,
    fewest,
    note_positions,
    singular_directions,
)
from foveate.analysis.base import Head, Record, describe
from foveate.hf.ablate import by_layer
from foveate.hf.frozen import before_norm
from foveate.hf.parts import Inputs, Parts, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register


@register(
    Card(
        name="sparse_svd",
        title="Sparse Attention Decomposition Applied to Circuit Tracing",
        year=2024,
        paper=165,
        claim="a few singular directions of a head carry its largest scores",
        kind="analysis",
        family="analysis",
        patterns=("noncausal self", "causal self"),
        pretrained="exact",
        cost="a pass, and a singular value decomposition (D, D) for every head and pair",
        confidence="medium-high",
    )
)
@dataclass(frozen=True, kw_only=True)
class SparseSvd:
    """How many singular directions carry the score of a head at the key it looks at most.

    For at most `pairs` evenly spaced queries of every text: the key of the largest weight (with
    `skip_first` not the first one), its score less the mean of all other keys it may see, as parts
    of directions. `directions` (layer, head) is the median of the fewest that hold `share` of it,
    `random` the same in a random basis of the same range, `score` the mean relative score, `pairs`
    how many were above 0 and counted. NaN where none was.
    """

    share: float = 0.7
    pairs: int = 20
    skip_first: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        ops.check_block("pairs", self.pairs)
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    @torch.no_grad()
    def __call__(self, model: Any, inputs: Inputs, heads: Iterable[Head] | None = None) -> Record:
        """Of a model on token ids (B, L) or a tokenizer's batch; heads: all, or those named.

        Raises TypeError for a model whose queries are not turned projections of a normed stream.
        """
        parts = Parts(model)
        every = [(i, h) for i in range(parts.layers) for h in range(parts.heads)]
        chosen = by_layer(every if heads is None else parts.check_heads(heads))
        values = {
            name: torch.full((parts.layers, parts.heads), float("nan"))
            for name in ("directions", "random", "score", "pairs")
        }
        streams: list[Tensor] = []
        tables: dict[int, Any] = {}

        def attention(seen: Seen) -> None:
            if seen.layer not in chosen:
                return
            made = Scores(parts, seen, streams[-1], tables[seen.layer])
            for head in chosen[seen.layer]:
                for name, value in self._of_head(made, head).items():
                    values[name][seen.layer, head] = value

        hooks = [note_positions(parts, layer, tables) for layer in chosen]
        try:
            with watch(model, attention=attention, block_in=lambda _, x: streams.append(x)):
                run(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(values, ("layer", "head"))
        about = describe(model, inputs, **asdict(self))
        return Record("sparse_svd", values, axes, "directions", about)

    def _of_head(self, made: Scores, head: int) -> dict[str, float]:
        """Figures of one head."""
        generator = torch.Generator().manual_seed(self.seed)
        counts, others, scores = [], [], []
        for text, row, key, rest in made.pairs(head, self.pairs, self.skip_first):
            x, w_q, w_k, against, turn = made.pair(head, text, row, key, rest)
            u = singular_directions(w_q, w_k, turn).u
            parts = contributions(x, w_q, against, u)
            if float(parts.sum()) <= 0:
                continue
            size = u.shape[1]
            mix = torch.linalg.qr(torch.randn(size, size, generator=generator).to(u))[0]
            counts.append(len(fewest(parts, self.share)))
            others.append(len(fewest(contributions(x, w_q, against, u @ mix), self.share)))
            scores.append(float(parts.sum()))
        if not counts:
            return {"pairs": 0.0}
        found = {"directions": counts, "random": others, "score": scores}
        middle = {name: float(torch.tensor(x).double().median()) for name, x in found.items()}
        return middle | {"score": sum(scores) / len(scores), "pairs": float(len(counts))}


class Traced(NamedTuple):
    """What earlier heads (layers, heads) add to a score at the query's and at the key's token.

    `query` is of the relative score, `key` of the score itself; `signal` (2, width) are the
    directions in the stream, of the query's and of the key's token, that these parts lie along.
    """

    query: Tensor
    key: Tensor
    signal: Tensor


@torch.no_grad()
def trace(model: Any, ids: Tensor, head: Head, row: int, key: int, *, share: float = 0.7) -> Traced:
    """Follow the singular directions that carry `share` of a score to the heads that write them.

    ids (1, L); the score is that of query `row` and an earlier `key`, the scale of the norm before
    `head` is fixed. Raises ValueError where the relative score is not above 0, IndexError for a
    head out of range, TypeError as `SparseSvd` does.
    """
    parts = Parts(model)
    ((layer, own),) = parts.check_heads([head])
    streams: list[Tensor] = []
    outs: list[Tensor] = []
    tables: dict[int, Any] = {}
    signals: list[Tensor] = []

    def attention(seen: Seen) -> None:
        if seen.layer < layer:
            outs.append(seen.out[0, :, [row, key]])
        elif seen.layer == layer:
            made = Scores(parts, seen, streams[-1], tables[layer])
            signals.extend(made.signals(own, row, key, share))

    hook = note_positions(parts, layer, tables)
    try:
        with watch(model, attention=attention, block_in=lambda _, x: streams.append(x)):
            run(model, ids)
    finally:
        hook.remove()
    norm = parts.norm_before_attention(layer)
    signal = before_norm(norm, streams[layer][0, [row, key]], torch.stack(signals))
    added = torch.zeros(2, parts.layers, parts.heads)
    for i, out in enumerate(outs):
        written = parts.contributions(i, out[None])[0]
        added[:, i] = torch.einsum("htw,tw->th", written, signal)
    return Traced(added[0], added[1], signal)
