"""Scores of attention as a bilinear form of the streams, and its singular directions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.hf.parts import Parts
from foveate.hf.watch import Seen
from foveate.hf.weights import projection

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


def fewest(parts: Tensor, share: float) -> Tensor:
    """Which of parts (n,), the largest first, hold a share of their sum, which is above 0."""
    held, order = parts.sort(descending=True)
    return order[: int((held.cumsum(0) < share * parts.sum()).sum()) + 1]


class Scores:
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
        self.gain = gain
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

    def visible(self, rows: Tensor) -> Tensor:
        """Which keys rows may see, (B, Hq, n, Lk): those that equal logits give a weight."""
        zeros = torch.zeros_like(self.seen.q)
        return ops.attention_rows(zeros, self.seen.k, rows, **self.seen.options()) > 0

    def pairs(self, head: int, count: int, skip_first: bool) -> list[tuple[int, int, int, Tensor]]:
        """Text, query, the key of the largest weight, and the other keys that it may see."""
        seen = self.seen
        rows = torch.linspace(0, seen.q.shape[2] - 1, min(count, seen.q.shape[2])).round().long()
        weights = seen.rows(rows)[:, head]
        visible = self.visible(rows)[:, head]
        found = []
        for text, at in seen.real_rows[:, rows].nonzero().tolist():
            keys = visible[text, at].nonzero()[:, 0]
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

    def signals(self, head: int, row: int, key: int, share: float) -> list[Tensor]:
        """Directions (width,) after the norm, of the query and of the key, that carry a score."""
        keys = self.visible(torch.tensor([row]))[0, head, 0].nonzero()[:, 0]
        x, w_q, w_k, against, turn = self.pair(head, 0, row, key, keys[keys != key])
        form = singular_directions(w_q, w_k, turn)
        parts = contributions(x, w_q, against, form.u)
        if float(parts.sum()) <= 0:
            raise ValueError(f"the score of query {row} and key {key} is not above the others'")
        kept = fewest(parts, share)
        u, v = form.u[:, kept], form.v[:, kept]
        of_query = u @ (u.T @ (w_q.T @ against))
        of_key = v @ (self.scale * form.sizes[kept] * (u.T @ x))
        sides = [signal[:-1].to(self.gain) for signal in (of_query, of_key)]
        return [torch.where(self.gain == 0, 0.0, side / self.gain) for side in sides]


def note_positions(parts: Parts, layer: int, tables: dict[int, Any]) -> Any:
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
