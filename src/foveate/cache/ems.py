"""Tokens that matter stay, tokens that resemble them are merged into them, the rest goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from foveate import ops
from foveate.cache.base import Bounded, Packed, Slots, Tables
from foveate.registry import Card, register


@register(
    Card(
        name="ems",
        title="EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on "
        "Global-Local Importance",
        claim="global and local attention together tell what matters; of the rest, what is "
        "redundant is merged and not lost",
        kind="cache",
        family="decode",
        year=2024,
        paper=91,
        cost="O(L²·D) once after a prefill of L tokens, O(budget²·D) at every compression",
        decoding="compressed anew whenever `buffer` slots lie over the budget",
        confidence="a reconstruction: scores, zero class and order of steps are the paper's; how "
        "scores are joined, what merging weighs by, compression while decoding, defaults are ours",
        small={"budget": 16, "window": 4, "buffer": 4},
        full={"budget": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class EMS(Bounded):
    """Per kv head the last `window` tokens, and centres that stand for the tokens around them.

    A token's score joins (`combine`: max or sum) the attention it received from all queries and
    from the last `window`, each scaled to mean 1, smoothed by a maximum over `smooth` neighbours
    (odd, 1 for none). The best are centres; of the next best, `reach` − 1 for each centre (1: pure
    eviction), those whose key has a cosine of at least `tau` with a centre's join the nearest one:
    keys and values become means weighted by score. `space` says whether keys are compared and
    averaged without their rotary embedding (pre) or as they are stored (post). With `mass` a slot
    weighs as much as the tokens it stands for: without, merging loses more than eviction does.
    """

    window: int = 128
    combine: str = "max"
    smooth: int = 1
    reach: int = 4
    tau: float = 0.9
    space: str = "pre"
    mass: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if ops.check_block("window", self.window) >= self.budget:
            raise ValueError(f"window must be below the budget {self.budget}, got {self.window}")
        if ops.check_block("smooth", self.smooth) % 2 == 0:
            raise ValueError(f"smooth must be odd, got {self.smooth}")
        ops.check_block("reach", self.reach)
        for name, known in (("combine", ("max", "sum")), ("space", ("post", "pre"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}"
                )

    @property
    def notes(self) -> tuple[str, ...]:
        """Attention from all queries and from the recent ones, and what merging needs."""
        more = (("position", self.space == "pre"), ("count", self.mass))
        return ("total", "recent", *(name for name, wanted in more if wanted))

    def observe(self, q: Tensor, k: Tensor, notes: Packed, *, scale: float | None) -> Packed:
        """A longer call tells the recent attention anew, a decoded token adds to it."""
        late = q[:, :, -self.window :]
        new = ops.token_scores(q, k, over="sum", scale=scale)[0]
        if q.shape[2] == 1:
            recent = notes["recent"] + new
        else:
            recent = ops.token_scores(late, k, over="sum", scale=scale)[0]
        return {"total": notes["total"] + new, "recent": recent}

    def score(self, q: Tensor, k: Tensor, notes: Packed, *, scale: float | None) -> Tensor:
        """Global and local scores joined; the window stays."""
        early = k.shape[2] - self.window
        every, late = (_scaled(notes[name], early) for name in ("total", "recent"))
        scores = torch.maximum(every, late) if self.combine == "max" else every + late
        if self.smooth > 1:
            scores[:, :early] = max_pool1d(scores[:, :early], self.smooth, 1, self.smooth // 2)
        scores[:, early:] = torch.inf
        return scores

    def merge(
        self, row: Slots, scores: Tensor, kept: Tensor, *, rope: Tables | None, layer: int
    ) -> Slots:
        """The kept slots, the centres among them made means of their clusters."""
        centre = kept & torch.isfinite(scores)
        count = int(centre[0].sum())
        total = _scaled(row.padded("total"), row.width - self.window)
        keys, tables = row.padded("k").float(), None
        if rope is not None and self.space == "pre":
            tables = rope(row.padded("position"))
            keys = ops.unrope(keys[:, None], *tables)[:, 0]
        slot, member = self._clusters(keys, scores, centre, kept)
        weight = scores.clamp_min(1e-9).masked_fill(~member, 0.0)

        def put(x: Tensor, means: Tensor) -> Tensor:
            out = x.to(means.dtype, copy=True)  # other caches may share what is held
            out[centre] = means.flatten(0, 1)
            return out

        mixed = {
            "k": put(keys, ops.mix(keys, slot, weight, count)),
            "v": put(row.padded("v"), ops.mix(row.padded("v"), slot, weight, count)),
            "total": put(total, _sums(weight, slot, member, count)),
            "recent": torch.zeros_like(total),
        }
        if tables is not None:
            mixed["k"] = ops.rope(mixed["k"][:, None], *tables)[:, 0]
        if self.mass:
            behind = row.padded("count")
            mixed["count"] = put(behind, _sums(behind, slot, member, count))
        held = {name: x.flatten(0, 1).to(row.held[name].dtype) for name, x in mixed.items()}
        return row.replaced(held).keep(kept)

    def _clusters(
        self, keys: Tensor, scores: Tensor, centre: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The cluster every slot (Hkv, n) would belong to, and whether it belongs to one."""
        at = _where(centre)
        slot = centre.long().cumsum(1).sub(1).clamp_min(0)
        member = centre.clone()
        pool = torch.zeros_like(kept)
        if self.reach > 1:
            pool = ops.top_k(scores, (self.reach - 1) * at.shape[1], visible=~kept)
        if bool(pool.any()):
            others = _where(pool)
            centres, rest = (normalize(_rows(keys, idx), dim=-1) for idx in (at, others))
            best, nearest = (rest @ centres.transpose(1, 2)).max(-1)
            slot.scatter_(1, others, nearest)
            member.scatter_(1, others, best >= self.tau)
        return slot, member


def _scaled(x: Tensor, early: int) -> Tensor:
    """Scores (Hkv, n) with a mean of 1 over the first `early` slots of each head."""
    return x / x[:, :early].mean(1, keepdim=True).clamp_min(1e-9)


def _where(marked: Tensor) -> Tensor:
    """Indices (Hkv, m) of what is marked, equally often in every head."""
    return marked.nonzero()[:, 1].view(marked.shape[0], -1)


def _rows(x: Tensor, idx: Tensor) -> Tensor:
    """Slots idx (Hkv, m) of x (Hkv, n, ·)."""
    return x.gather(1, idx[..., None].expand(-1, -1, x.shape[2]))


def _sums(x: Tensor, slot: Tensor, member: Tensor, count: int) -> Tensor:
    """Sums (Hkv, count) of x (Hkv, n) over the members of each cluster."""
    return x.new_zeros(x.shape[0], count).scatter_add(1, slot, x * member)
