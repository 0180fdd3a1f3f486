"""Flowformer: Linearizing Transformers with Conservation Flows (2022, paper 25)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._linear import head_width
from foveate.nn._recurrent import Recurrent, State
from foveate.registry import Card, register

_EPS = 1e-6


class Sums(NamedTuple):
    """What causal Flow-Attention sums up: the four flows (B, H, D), competition (B, H), state."""

    keys: Tensor | None = None
    queries: Tensor | None = None
    sources: Tensor | None = None
    sinks: Tensor | None = None
    competition: Tensor | None = None
    s: Tensor | None = None


@dataclass(frozen=True)
class FlowState(State):
    """A state with the sums of the flows."""

    sums: Sums | None = None


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    clamp: float = 5.0,
    valid: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """Attention whose keys compete for what they give, and whose queries are gated by what comes.

    q (B, H, n, D), k (B, H, m, D), v (B, H, m, Dv), real keys valid (B, m), real queries own (B, n)
    -> (B, H, n, Dv). Flow into a query and out of a key is φ(q)·φ(k) summed, φ the sigmoid; with
    the other side's flow brought to 1, what goes out of a key (within ± clamp) is its logit in a
    softmax over the keys.
    """
    real, asked = _real(k, valid), _real(q, own)
    fq, fk = _features(q, asked), _features(k, real)
    incoming = _flow(fq, fk.sum(2, keepdim=True))
    outgoing = _flow(fk, fq.sum(2, keepdim=True))
    into = _flow(fq, (fk / outgoing).sum(2, keepdim=True))
    out_of = _flow(fk, (fq / incoming).sum(2, keepdim=True)).clamp(-clamp, clamp)
    n, m = (x.sum(1)[:, None, None, None] for x in (asked, real))
    shown = out_of.masked_fill(real[:, None, :, None] == 0, float("-inf"))
    competition = shown.softmax(2).nan_to_num(0.0) * m
    given = ops.linear_attention_global(fq / incoming, fk, v * competition, normalize=False)
    return torch.sigmoid(into * n / m.clamp_min(1)) * given


def flow_attention_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    clamp: float = 5.0,
    before: Sums | None = None,
    count: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """Flow-Attention of every token to those up to it, and the sums after the last.

    q and k (B, H, T, D), v (B, H, T, Dv), sums `before` of `count` (B,) tokens -> (B, H, T, Dv) and
    sums. Real tokens are those of valid (B, T), which come first. Every sum of `flow_attention` is
    one over the tokens so far, means stand for sums where both sides have grown alike.
    """
    before = Sums() if before is None else before
    real = _real(k, valid)
    c = torch.arange(1, k.shape[2] + 1, device=k.device, dtype=k.dtype)[:, None]
    if count is not None:
        c = c + count.to(k.dtype)[:, None, None, None]
    fq, fk = _features(q, real), _features(k, real)
    keys, queries = _summed(fk, before.keys), _summed(fq, before.queries)
    incoming, outgoing = _flow(fq, keys), _flow(fk, queries)
    sources = _summed(fk * c / outgoing, before.sources)
    sinks = _summed(fq * c / incoming, before.sinks)
    into, out_of = _flow(fq, sources) / c, (_flow(fk, sinks) / c).clamp(-clamp, clamp)
    raised = out_of.exp() * real[:, None, :, None]
    mass = _summed(raised, None if before.competition is None else before.competition[..., None])
    weighted = v * raised / mass.clamp_min(_EPS) * c
    given, s = ops.scan(fq / incoming, fk, weighted, scale=1.0, state=before.s, valid=valid)
    keys, queries, sources, sinks = (x[:, :, -1] for x in (keys, queries, sources, sinks))
    last = Sums(keys, queries, sources, sinks, mass[:, :, -1, 0], s)
    return torch.sigmoid(into) * given, last


def _real(x: Tensor, valid: Tensor | None) -> Tensor:
    """1 for real tokens of x (B, H, L, ·), 0 for others: (B, L)."""
    return torch.ones_like(x[:, 0, :, 0]) if valid is None else valid.to(x.dtype)


def _features(x: Tensor, real: Tensor) -> Tensor:
    """sigmoid(x) (B, H, L, D), 0 for what is not real (B, L)."""
    return torch.sigmoid(x) * real[:, None, :, None]


def _flow(x: Tensor, total: Tensor) -> Tensor:
    """x·total for each token, (B, H, L, 1), never 0."""
    return ((x + _EPS) * (total + _EPS)).sum(-1, keepdim=True)


def _summed(x: Tensor, before: Tensor | None) -> Tensor:
    """Sums over the tokens so far of x (B, H, T, ·)."""
    sums = x.cumsum(2)
    return sums if before is None else sums + before[:, :, None]


@register(
    Card(
        name="flow",
        title="Flowformer: Linearizing Transformers with Conservation Flows",
        year=2022,
        paper=25,
        claim="conserved flows let keys compete as softmax does, in linear time",
        kind="module",
        family="linear",
        patterns=("noncausal self", "causal self", "noncausal cross"),
        pretrained="scratch",
        cost="O(L·D²) time",
        decoding="a state of heads · D · (D + 4) numbers, and one more a head",
        confidence="high",
        small={"dim": 32, "heads": 4},
        exempt={
            "mask honoured": "in cross-attention each query changes what keys give to the others; "
            "masks are held to the rows without the hidden tokens"
        },
    )
)
class Flow(Recurrent):
    """Projections around `flow_attention`; the flow out of a key is kept within ± `clamp`.

    Raises ValueError for sizes that do not divide and for a clamp that is not above 0.
    """

    State = FlowState

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        clamp: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if clamp <= 0:
            raise ValueError(f"clamp must be above 0, got {clamp}")
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.width, self.clamp = head_width(dim, heads), clamp
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, **made) for _ in range(4))

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The causal form."""
        out, sums = flow_attention_causal(
            *self._heads(x, x), clamp=self.clamp, before=state.sums, count=state.pos, valid=valid
        )
        return self.out(joined_heads(out).to(x.dtype)), replace(state, sums=sums)

    def whole(self, x: Tensor, source: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
        """Flows between all queries and all keys."""
        own = valid if x is source else None
        out = flow_attention(*self._heads(x, source), clamp=self.clamp, valid=valid, own=own)
        y: Tensor = self.out(joined_heads(out).to(x.dtype))
        return y

    def _heads(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, L, D) in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (y.to(wide) for y in (self.q(x), self.k(source), self.v(source)))
        return heads_of(q, self.width), heads_of(k, self.width), heads_of(v, self.width)
