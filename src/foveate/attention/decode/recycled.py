"""A dense decoding step now and then; the steps between read what it attended to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Call, IndexReuse
from foveate.registry import Card, register


@register(
    Card(
        name="recycled",
        title="Recycled Attention: Efficient inference for long-context language models",
        claim="the tokens one step attends to serve the next ones better than the recent tokens",
        kind="attention",
        family="decode",
        year=2024,
        paper=315,
        phases=("decode",),
        cost="per step n/stride + budget tokens read instead of n",
        decoding="full KV cache and one list of tokens per kv head",
        confidence="published pseudo-code; whether the first version smooths weights is open",
        small={"budget": 16, "stride": 4},
        full={"budget": 1 << 30},
        exempt={"grouped heads": "one list serves the query heads of a kv head, by definition"},
    )
)
@dataclass(frozen=True, kw_only=True)
class Recycled(IndexReuse):
    """Every `stride`-th step is dense and lists the `budget` tokens with the largest weights.

    The prompt's last query makes the first list. A kv head's weights are the maximum (or mean) of
    its query heads' (`group`), smoothed by a maximum over `pool` neighbours (odd, 0 for none).
    Between, every new token joins the list, and (`evict`) the one of lowest weight leaves it. With
    a `threshold` the schedule is dynamic: every `check_every` steps a layer is dense if the cosine
    of its mean query with that of its last dense step is below it. Sane budgets: n/8.
    """

    budget: int = 512
    stride: int = 10
    threshold: float | None = None
    check_every: int = 10
    group: str = "max"
    pool: int = 7
    evict: bool = True

    def __post_init__(self) -> None:
        for name in ("budget", "stride", "check_every"):
            ops.check_block(name, getattr(self, name))
        if self.group not in ("max", "mean"):
            raise ValueError(f"group must be max or mean, got {self.group!r}")
        if self.pool < 0 or (self.pool and self.pool % 2 == 0):
            raise ValueError(f"pool must be odd, or 0 for none, got {self.pool}")

    def prefilled(self, q: Tensor, k: Tensor, call: Call) -> None:
        """The prompt is step 0: its last query makes the first list."""
        call.state[call.layer].clear()
        self.choose(q, k, call)

    def due(self, q: Tensor, k_len: int, call: Call) -> bool:
        """Steps of the schedule, and those that do not continue what the state knows."""
        held = call.state[call.layer]
        if held.get("k_len") != k_len - 1:
            return True
        step = held["step"] + 1
        if self.threshold is None:
            return step % self.stride == 0
        if step % self.check_every:
            return False
        return self.turned(_mean(q), self.threshold, call)

    def choose(self, q: Tensor, k: Tensor, call: Call) -> None:
        """List the tokens of the largest weights, lowest first: the order in which they leave."""
        weights = ops.token_scores(
            q, k, over="last", group=self.group, pool=self.pool, pool_mode="max", scale=call.scale
        )
        idx = weights.topk(min(self.budget, k.shape[2])).indices.flip(-1)
        held = call.state[call.layer]
        step = held["step"] + 1 if held.get("k_len") == k.shape[2] - 1 else 0
        held.update(idx=idx, k_len=k.shape[2], step=step, query=_mean(q))

    def recall(self, k_len: int, call: Call) -> Tensor:
        """The list and the new token, which stays for the next step."""
        held = call.state[call.layer]
        new = torch.full_like(held["idx"][..., :1], k_len - 1)
        idx = torch.cat([held["idx"], new], -1)
        kept = idx[..., -self.budget :] if self.evict else idx
        held.update(idx=kept, k_len=k_len, step=held["step"] + 1)
        return idx


def _mean(q: Tensor) -> Tensor:
    """The last query averaged over the layer's heads, (D,) float32."""
    return q[:, :, -1].float().mean((0, 1))
