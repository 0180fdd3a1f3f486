"""Kinetics: what test-time scaling costs, and sparse decoding under a budget (2025, paper 325)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Call, TokenSparse
from foveate.registry import Card, register

# FLOP per byte of the device in the paper's figures.
INTENSITY = 562.5


@register(
    Card(
        name="kinetics",
        title="Kinetics: Rethinking Test-Time Scaling Laws",
        year=2025,
        paper=325,
        claim="attention, not parameters, dominates the cost of long generations: reading the "
        "top keys only buys more of them",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="approximate",
        phases=("decode",),
        cost="per step one pass over the keys to choose, O(budget·D) to attend",
        decoding="chooses anew at every step; full KV cache",
        confidence="high: cost formulas checked against sums over steps; medium on budgets",
        small={"budget": 24, "local": 8, "block": 4},
        full={"budget": 1 << 30},
        exempt={"grouped heads": "the query heads of a kv head choose together"},
    )
)
@dataclass(frozen=True, kw_only=True)
class Kinetics(TokenSparse):
    """Sinks, the newest `local` tokens, and the tokens or blocks with the largest mean logit.

    Logits are averaged over the query heads of a kv head. `policy` token lists the best tokens (an
    oracle: the choice costs all logits), block the best blocks of `block` tokens by their mean
    logit, which is the product of query and mean key. `budget` counts all tokens, in whole blocks
    for policy block.
    """

    budget: int = 512
    local: int = 64
    sinks: int = 4
    policy: str = "token"
    block: int = 16

    def __post_init__(self) -> None:
        for name in ("budget", "local", "block"):
            ops.check_block(name, getattr(self, name))
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if self.policy not in ("token", "block"):
            raise ValueError(f"policy must be token or block, got {self.policy!r}")
        # The newest tokens may touch one block more than they fill.
        edges = 0 if self.policy == "token" else 2 * self.block
        if self.budget < self.sinks + self.local + edges:
            least = f"sinks + local{' + 2 blocks' if edges else ''}"
            raise ValueError(
                f"budget must be at least {self.sinks + self.local + edges} ({least}), "
                f"got {self.budget}"
            )

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor | None] | None:
        """One list per kv head for the single query of a step, None for all tokens."""
        n = k.shape[2]
        if q.shape[2] > 1 or n <= self.budget:
            return None
        width = 1 if self.policy == "token" else self.block
        # The mean over heads of their logits is the logit of their mean query.
        asked = q.float().unflatten(1, (k.shape[1], -1)).mean(2)
        keys = k if width == 1 else ops.pool_blocks(k, width)
        sign = -1.0 if call.scale is not None and call.scale < 0 else 1.0
        scores = ops.grouped_logits(asked, keys.float(), sign)[:, :, 0]
        at = torch.arange(scores.shape[-1], device=q.device) * width
        forced = (at < self.sinks) | (at + width > n - self.local)
        chosen = scores.masked_fill(forced, math.inf).topk(self.budget // width).indices
        idx = chosen[..., None] * width + torch.arange(width, device=q.device)
        idx = idx.flatten(-2).sort(-1).values[:, :, None]
        return idx.clamp_max(n - 1), idx < n


class ModelCost(NamedTuple):
    """What the cost of a model depends on; heads are counted over all layers."""

    parameters: float
    q_heads: int
    kv_heads: int
    dim: int


class Cost(NamedTuple):
    """FLOP of compute, and of memory traffic at the device's FLOP per byte."""

    compute: float
    memory: float

    @property
    def total(self) -> float:
        """Equivalent FLOP."""
        return self.compute + self.memory


def generation_cost(
    model: ModelCost,
    prompt: int,
    output: int,
    *,
    trials: int = 1,
    budget: int | None = None,
    block: int | None = None,
    intensity: float = INTENSITY,
) -> Cost:
    """Cost of `trials` answers of `output` tokens to a prompt whose bfloat16 cache they share.

    Weights are read for free (many requests share them). With `budget` every step reads at most
    that many tokens, which each trial chooses, and so reads, for itself; with `block` choosing
    costs a pass over the mean keys of blocks.
    """
    dense = budget is None
    limit = prompt + output if budget is None else min(budget, prompt + output)
    # Tokens read, summed over the steps.
    read = limit * output - 0.5 * max(0, limit - prompt) ** 2
    shared = (prompt + 0.5 * trials * output) * output if dense else trials * read
    compute = trials * (2 * model.parameters * output + 4 * read * model.q_heads * model.dim)
    memory = 4 * shared * model.kv_heads * model.dim
    if block is not None and not dense:
        per_trial = (2 * prompt + output) / block * output
        compute += trials * per_trial * model.q_heads * model.dim
        over_all = (2 * prompt + trials * output) / block * output
        memory += over_all * model.kv_heads * model.dim
    return Cost(compute, intensity * memory)


def coverage(correct: int, total: int, trials: int) -> float:
    """Chance that one of `trials` answers, drawn from `total` of which `correct` are, is right."""
    if not 0 <= correct <= total or not 1 <= trials <= total:
        raise ValueError(
            f"wanted 0 <= correct <= total and 1 <= trials <= total, "
            f"got correct {correct}, total {total}, trials {trials}"
        )
    return 1 - math.comb(total - correct, trials) / math.comb(total, trials)
