"""Sparse Attention Decomposition Applied to Circuit Tracing (2024, paper 165)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.analysis.base import Head, Record, describe
from foveate.hf.ablate import by_layer
from foveate.hf.parts import Inputs, Parts, run
from foveate.hf.watch import Seen, watch
from foveate.hf.weights import projection
from foveate.registry import Card, register

# The largest difference, relative to the queries, of queries made again from the stream.
_REBUILT = 1e-3


class Directions(NamedTuple):
    """Σ u σ vᵀ: directions u and v (width, D) of queries' and of keys' streams, sizes σ (D,)."""

    u: Tensor
    sizes: Tensor
    v: Tensor


def singular_directions(w_q: Tensor, w_k: Tensor, turn: Tensor | None = None) -> Directions:
    """The form W_Qᵀ T W_K of a head in singular directions; it is never made as a whole.

    w_q and w_k (D, width) make queries and keys of a stream, T (D, D) is the turn between their
    positions (None: none).
    """
    (q_basis, q_core), (k_basis, k_core) = (torch.linalg.qr(w.T) for w in (w_q, w_k))
    core = q_core @ (k_core.T if turn is None else turn @ k_core.T)
    u, sizes, v = torch.linalg.svd(core)
    return Directions(q_basis @ u, sizes, k_basis @ v.T)


def contributions(x: Tensor, w_q: Tensor, against: Tensor, u: Tensor) -> Tensor:
    """What each direction of u (width, n) adds to the score (W_Q x) · against, (n,).

    x (width,) is the query's stream, `against` (D,) a key, or a difference of keys, turned as the
    unturned query sees it. The parts sum to the score when u is an orthonormal basis of the range
    of W_Qᵀ.
    """
    return (u.T @ x) * (u.T @ (w_q.T @ against))


def fewest(parts: Tensor, share: float) -> int:
    """How many of parts (n,), the largest first, hold a share of their sum, which is above 0."""
    held = parts.sort(descending=True).values.cumsum(0)
    return int((held < share * parts.sum()).sum()) + 1


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
        confidence="medium-high; tracing upstream is not here",
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
            made = _Made(parts, seen, streams[-1], tables[seen.layer])
            for head in chosen[seen.layer]:
                for name, value in self._of_head(made, head).items():
                    values[name][seen.layer, head] = value

        hooks = [_note_positions(parts, layer, tables) for layer in chosen]
        try:
            with watch(model, attention=attention, block_in=lambda _, x: streams.append(x)):
                run(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(values, ("layer", "head"))
        about = describe(model, inputs, **asdict(self))
        return Record("sparse_svd", values, axes, "directions", about)

    def _of_head(self, made: _Made, head: int) -> dict[str, float]:
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
            counts.append(fewest(parts, self.share))
            others.append(fewest(contributions(x, w_q, against, u @ mix), self.share))
            scores.append(float(parts.sum()))
        if not counts:
            return {"pairs": 0.0}
        found = {"directions": counts, "random": others, "score": scores}
        middle = {name: float(torch.tensor(x).double().median()) for name, x in found.items()}
        return middle | {"score": sum(scores) / len(scores), "pairs": float(len(counts))}


class _Made:
    """A layer's queries and keys as what they are made of, in float64.

    Streams are normed, without the norm's gain, which joins the weights, and end in a 1, which
    meets the biases.
    """

    def __init__(self, parts: Parts, seen: Seen, stream: Tensor, table: Any) -> None:
        norm = parts.norm_before_attention(seen.layer)
        ones = torch.ones_like(stream[0, 0])
        ones[1::2] = -1.0
        shift = norm(torch.zeros_like(ones))
        gain = (norm(ones) - shift) * ones
        bare = torch.where(gain == 0, 0.0, (norm(stream) - shift) / gain)
        self.x = torch.nn.functional.pad(bare, (0, 1), value=1.0).double()
        self.w = {}
        for role, heads in (("q", parts.heads), ("k", parts.kv_heads)):
            where = projection(parts, seen.layer, role)
            weight, bias = where.features(where.module.weight), where.module.bias
            constant = weight @ shift
            if bias is not None:
                constant = constant + bias[where.start : where.stop]
            folded = torch.cat((weight * gain, constant[:, None]), 1)
            self.w[role] = folded.unflatten(0, (heads, -1)).double()
        self.seen, self.group = seen, parts.heads // parts.kv_heads
        self.scale = seen.q.shape[3] ** -0.5 if seen.scale is None else seen.scale
        self.turns = _turns(seen, table)
        own = torch.einsum("bhlij,hiw,blw->bhlj", self.turns[:, None], self.w["q"], self.x)
        if float((own - seen.q).norm() / seen.q.norm()) > _REBUILT:
            raise TypeError(
                f"{parts.name}: the queries of block {seen.layer} are no turned projection of its "
                "normed stream, so that their scores have no singular directions"
            )

    def pairs(self, head: int, count: int, skip_first: bool) -> list[tuple[int, int, int, Tensor]]:
        """Text, query, the key of the largest weight, and the other keys that it may see."""
        seen = self.seen
        rows = torch.linspace(0, seen.q.shape[2] - 1, min(count, seen.q.shape[2])).round().long()
        weights = seen.rows(rows)[:, head]
        alike = ops.attention_rows(torch.zeros_like(seen.q), seen.k, rows, **seen.options())
        found = []
        for text, at in seen.real_rows[:, rows].nonzero().tolist():
            keys = (alike[text, head, at] > 0).nonzero()[:, 0]
            looked = keys[int(skip_first) :]
            if len(keys) < 2 or not len(looked):
                continue
            key = int(looked[weights[text, at, looked].argmax()])
            found.append((text, int(rows[at]), key, keys[keys != key]))
        return found

    def pair(
        self, head: int, text: int, row: int, key: int, rest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Stream, weights of queries and of keys, the difference of keys, and the turn."""
        kv = head // self.group
        keys = self.seen.k[text, kv].double()
        own = self.turns[text % len(self.turns)]
        against = own[row] @ (self.scale * (keys[key] - keys[rest].mean(0)))
        turn = own[row] @ own[key].T
        return self.x[text, row], self.w["q"][head], self.w["k"][kv], against, turn


def _note_positions(parts: Parts, layer: int, tables: dict[int, Any]) -> Any:
    """Keep the cosines and sines that the attention of a layer is given, if it is."""

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tables[layer] = kwargs.get("position_embeddings")

    return parts.attention(layer).register_forward_pre_hook(note, with_kwargs=True)


def _turns(seen: Seen, table: Any) -> Tensor:
    """Turns (B|1, L, D, D) of positions: row i of each is where unit vector i comes to lie."""
    tokens, size = seen.q.shape[2:]
    unit = torch.eye(size, dtype=torch.float64)[None, :, None].expand(1, size, tokens, size)
    if table is not None:
        cos, sin = (x.double() for x in table)
        unit = ops.rope(unit.expand(len(cos), -1, -1, -1), cos, sin)
    return unit.transpose(1, 2)
