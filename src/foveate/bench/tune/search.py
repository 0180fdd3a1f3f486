"""Searchers: from what changes cost and lose, one candidate for every layer and kv head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.bench.tune.allocate import allocate

Searcher = Callable[[Tensor, Tensor, float], Tensor]
"""(cost (items, n), loss (items, n), budget) -> candidate of every item; candidate 0 is dense."""


def greedy(cost: Tensor, loss: Tensor, budget: float) -> Tensor:
    """From dense attention, the change that loses least per second saved, until the budget holds.

    An item that was changed may be changed again to something cheaper. Raises ValueError where no
    choice is cheap enough.
    """
    cost, loss = cost.double(), loss.double()
    choice = torch.zeros(len(cost), dtype=torch.long)
    # Sums in another order round otherwise: what fits exactly must not fail for that.
    while float(cost.gather(1, choice[:, None]).sum()) > budget + 1e-6 * float(cost.abs().sum()):
        saved = cost.gather(1, choice[:, None]) - cost
        lost = (loss - loss.gather(1, choice[:, None])).clamp_min(0)
        rate = torch.where(saved > 0, lost / saved.clamp_min(1e-30), torch.inf)
        if not bool(torch.isfinite(rate).any()):
            raise ValueError(f"no choice costs as little as {budget}")
        item, candidate = divmod(int(rate.argmin()), cost.shape[1])
        choice[item] = candidate
    return choice


def pareto(cost: Tensor, loss: Tensor, budget: float) -> Tensor:
    """The choice of least summed loss within the budget: a point of the front of all choices."""
    return allocate(cost, _finite(loss), budget)


def _finite(loss: Tensor) -> Tensor:
    """What is infinitely bad as something no budget would choose."""
    top = (
        loss[torch.isfinite(loss)].max() if bool(torch.isfinite(loss).any()) else loss.new_zeros(())
    )
    return torch.where(torch.isfinite(loss), loss, 1e6 * (top + 1))


SEARCHERS: dict[str, Searcher] = {"pareto": pareto, "greedy": greedy, "influence": pareto}
"""By name; `influence` weighs windows by MoA's first-order influence, the others everything by the
expected KL."""
