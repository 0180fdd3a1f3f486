"""Tokens that gathered the most attention so far stay, beside the recent ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate import ops
from foveate.cache.base import Bounded, Packed, Shared
from foveate.registry import Card, register


@register(
    Card(
        name="h2o",
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language "
        "Models",
        claim="a few tokens gather most of the attention: with the recent ones they suffice",
        kind="cache",
        family="decode",
        year=2023,
        cost="O(L²·D) once after a prefill of L tokens, O(budget·D) at every step",
        decoding="at most budget + buffer tokens; every step adds to the scores",
        confidence="definition; one score for the query heads of a kv head (their mean)",
        small={"budget": 16, "buffer": 0},
        full={"budget": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class H2O(Shared, Bounded):
    """Keeps, per kv head, the last `recent` share of the budget and the heavy hitters.

    A token's score is the attention it received from all queries since it came, its own included,
    averaged over the query heads of a kv head. The kv heads of a layer may share its budget
    (`floor` below 1).
    """

    recent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent < 1:
            raise ValueError(f"recent must be at least 0 and below 1, got {self.recent}")

    @property
    def notes(self) -> tuple[str, ...]:
        """The attention received so far."""
        return ("score",)

    def observe(self, q: Tensor, k: Tensor, notes: Packed, *, scale: float | None) -> Packed:
        """Scores with what the queries of the call add."""
        return {"score": notes["score"] + ops.token_scores(q, k, over="sum", scale=scale)[0]}

    def score(self, q: Tensor, k: Tensor, notes: Packed, *, scale: float | None) -> Tensor:
        """Attention received; the recent tokens stay."""
        scores = notes["score"].clone()
        scores[:, k.shape[2] - int(self.recent * self.budget) :] = float("inf")
        return scores
