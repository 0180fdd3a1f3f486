"""The last queries of the prompt vote for the earlier tokens that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from foveate import ops
from foveate.cache.base import Packed, Shared
from foveate.registry import Card, register


@register(
    Card(
        name="snapkv",
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        claim="what the end of a prompt attends to is what its answer will attend to",
        kind="cache",
        family="decode",
        year=2024,
        cost="O(window·L·D) once after a prefill; O(budget + decoded) memory",
        decoding="ordinary, over the kept prompt and every decoded token",
        confidence="definition; one vote for the query heads of a kv head (their mean), and "
        "votes smoothed by a maximum over 7 tokens",
        small={"budget": 16, "window": 4},
        full={"budget": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class SnapKV(Shared):
    """Keeps, per kv head, the last `window` tokens and the best-voted earlier ones.

    A vote is the mean softmaxed attention of the last `window` queries and of the query heads of
    a kv head, smoothed over `pool` neighbouring tokens (odd, 1 for none) by `smooth`, max or avg.
    Smoothing keeps passages whole, as the paper wants for recall; unsmoothed votes stay nearer to
    the dense model's logits on running text. The kv heads of a layer may share its budget
    (`floor` below 1).
    """

    window: int = 32
    pool: int = 7
    smooth: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if ops.check_block("window", self.window) >= self.budget:
            raise ValueError(f"window must be below the budget {self.budget}, got {self.window}")
        if ops.check_block("pool", self.pool) % 2 == 0:
            raise ValueError(f"pool must be odd, got {self.pool}")
        if self.smooth not in ("avg", "max"):
            raise ValueError(f"smooth must be avg or max, got {self.smooth!r}")

    def score(self, q: Tensor, k: Tensor, notes: Packed, *, scale: float | None) -> Tensor:
        """Votes; the window stays."""
        early = k.shape[2] - self.window
        votes = ops.token_scores(q[:, :, -self.window :], k, scale=scale)[0]
        blur = avg_pool1d if self.smooth == "avg" else max_pool1d
        votes[:, :early] = blur(votes[:, :early], self.pool, 1, self.pool // 2)
        votes[:, early:] = torch.inf
        return votes
