"""The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry.

2024, paper 45.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import Projections, heads_of, joined_heads, load_projections, rotary
from foveate.nn._linear import head_width, queries_last
from foveate.nn._recurrent import Recurrent
from foveate.registry import PATTERNS, Card, register

_EPS = 1e-12


def _joint(y: Tensor) -> Tensor:
    """One softmax over (2y, -2y)."""
    return torch.cat((2 * y, -2 * y), -1).softmax(-1)


def _halves(y: Tensor) -> Tensor:
    """A softmax over y and one over -y."""
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).clamp_min(_EPS)


def _exponential(y: Tensor) -> Tensor:
    """The exponentials themselves, which may overflow."""
    return torch.cat((y, -y), -1).exp()


# Three different functions: a factor that each key has of its own does not cancel in the weights.
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "joint": _joint,
    "halves": _halves,
    "exp": _exponential,
}


class FeatureMaps(nn.Module):
    """A learned map for each head, x (B, H, L, K) -> φ(W x K^-1/4 + b) > 0 (B, H, L, 2K)."""

    def __init__(self, heads: int, width: int, features: str = "joint", **made: Any) -> None:
        super().__init__()
        if features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")
        self.kind = features
        start = torch.eye(width, **made).expand(heads, -1, -1)
        self.weight = nn.Parameter(start.clone())
        self.bias = nn.Parameter(torch.zeros(heads, 1, width, **made))

    def forward(self, x: Tensor) -> Tensor:
        """φ(x), in float32 at least."""
        y = (x * x.shape[-1] ** -0.25) @ self.weight.mT + self.bias
        return FEATURES[self.kind](y.to(torch.promote_types(y.dtype, torch.float32)))


def attention_transfer_loss(q: Tensor, k: Tensor, fq: Tensor, fk: Tensor) -> Tensor:
    """How far the weights of features are from those of softmax attention, in nats.

    q (B, Hq, L, D) and k (B, Hkv, L, D) as softmax attends to them causally (rotated, if they
    rotate), features fq (B, Hq, L, F), fk (B, Hkv, L, F) -> KL(softmax ‖ linear), the mean over
    rows, heads and batch. Holds L×L weights: L of at most some 1,000.
    """
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    logits = ops.grouped_logits(q, k, q.shape[3] ** -0.5).masked_fill(hidden, float("-inf"))
    log_p = logits.log_softmax(-1).masked_fill(hidden, 0.0)
    weights = ops.grouped_logits(fq, fk, 1.0).masked_fill(hidden, 0.0)
    log_r = (weights + _EPS).log() - (weights.sum(-1, keepdim=True) + _EPS).log()
    p = log_p.exp().masked_fill(hidden, 0.0)
    return (p * (log_p - log_r)).sum(-1).mean()


@register(
    Card(
        name="hedgehog",
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        year=2024,
        paper=45,
        claim="feature maps that learn softmax's own weights make a trained model linear",
        kind="module",
        family="linear",
        patterns=PATTERNS,
        pretrained="fine-tune",
        cost="O(L·D²) time",
        decoding="a state of kv heads · 2D · (D + 1) numbers",
        confidence="high",
        small={"dim": 32, "heads": 4, "kv_heads": 2, "theta": 10_000.0},
    )
)
class Hedgehog(Recurrent):
    """Attention with weights φ(q)·φ(k), divided by their sum, φ a learned map for each head.

    `features`: "joint" is one softmax over (2y, -2y), "halves" two, "exp" the exponentials of (y,
    -y), y = W x K^-1/4 + b with W the identity at first. `kv_heads` None is one for each head. With
    `theta` heads rotate by their positions before φ. `head_dim` None is dim / heads. Raises
    ValueError for an unknown map and for sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        features: str = "joint",
        head_dim: int | None = None,
        theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        kv_heads = heads if kv_heads is None else ops.check_block("kv_heads", kv_heads)
        width = (
            head_width(dim, heads) if head_dim is None else ops.check_block("head_dim", head_dim)
        )
        if heads % kv_heads or (theta is not None and width % 2):
            raise ValueError(
                f"heads must be a multiple of kv_heads, and heads that rotate of an even width, "
                f"got {heads} and {kv_heads} heads of {width}"
            )
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim, self.theta = width, theta
        self.q = nn.Linear(dim, heads * width, bias=False, **made)
        self.k, self.v = (nn.Linear(dim, kv_heads * width, bias=False, **made) for _ in range(2))
        self.out = nn.Linear(heads * width, dim, bias=False, **made)
        self.map_q = FeatureMaps(heads, width, features, **made)
        self.map_k = FeatureMaps(kv_heads, width, features, **made)

    @classmethod
    def converted(
        cls,
        weights: Projections,
        heads: int,
        *,
        features: str = "joint",
        theta: float | None = None,
    ) -> Hedgehog:
        """A layer with the projections of a trained one, whose maps are still to learn from it."""
        width, dim = weights.q.shape[0] // heads, weights.q.shape[1]
        layer = cls(
            dim,
            heads,
            weights.k.shape[0] // width,
            features=features,
            head_dim=width,
            theta=theta,
            device=weights.q.device,
            dtype=weights.q.dtype,
        )
        load_projections(layer, weights)
        return layer

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ of queries and keys (B, H, L, D), rotated where they rotate -> (B, H, L, 2D)."""
        return self.map_q(q), self.map_k(k)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x (B, L, dim), keys and values of a source, (B, H, L, D) each, not rotated."""
        q, k, v = (heads_of(y, self.head_dim) for y in (self.q(x), self.k(source), self.v(source)))
        return q, k, v

    def joined(self, out: Tensor) -> Tensor:
        """What heads give, (B, H, L, D) -> (B, L, dim)."""
        y: Tensor = self.out(joined_heads(out))
        return y

    def summed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        before: tuple[Tensor, Tensor] | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Causal attention of rotated heads that goes on from sums; heads, and the sums after.

        q (B, Hq, L, D), k and v (B, Hkv, L, D), sums of φ(k) v (B, Hkv, 2D, D) and φ(k)
        (B, Hkv, 2D) over the tokens `before`, real tokens valid (B, L) -> (B, Hq, L, D).
        """
        fq, fk = self.features(q, k)
        out, after = ops.linear_attention_causal(
            fq, fk, v.to(fk.dtype), state=before, valid=valid, eps=_EPS
        )
        return out.to(v.dtype), after

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Attention to what came before, as a recurrence."""
        q, k, v = self.split(x, x)
        at = state.pos[:, None] + torch.arange(x.shape[1], device=x.device)
        before = None if state.s is None else (state.s, state.z)
        out, (s, z) = self.summed(self._turned(q, at), self._turned(k, at), v, before, valid)
        return self.joined(out), replace(state, s=s, z=z)

    def whole(self, x: Tensor, source: Tensor, valid: Tensor | None, causal: bool) -> Tensor:
        """Attention to a source, all of it or up to the queries' positions."""
        q, k, v = self.split(x, source)
        at = torch.arange(source.shape[1], device=x.device).expand(len(x), -1)
        if valid is not None:
            at = (valid.long().cumsum(1) - 1).clamp_min(0)
        first = max(source.shape[1] - x.shape[1], 0)
        own = at if x is source else torch.arange(first, first + x.shape[1], device=x.device)
        q, k = self._turned(q, own), self._turned(k, at)
        if causal:
            out, _ = self.summed(queries_last(q, k), k, v, None, valid)
            return self.joined(out[:, :, -q.shape[2] :])
        fq, fk = self.features(q, k)
        weight = None if valid is None else valid[:, None].expand(fk.shape[:3]).to(fk.dtype)
        out = ops.linear_attention_global(fq, fk, v.to(fk.dtype), weight, eps=_EPS)
        return self.joined(out.to(v.dtype))

    def _turned(self, x: Tensor, at: Tensor) -> Tensor:
        """Heads (B, H, L, D) rotated by positions (B, L) or (L,)."""
        return x if self.theta is None else ops.rope(x, *rotary(at, self.head_dim, self.theta))
