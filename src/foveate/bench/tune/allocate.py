"""Spending a budget: one candidate per item, of least total loss at an affordable cost."""

from __future__ import annotations

import torch
from torch import Tensor

# Partial choices kept from one item to the next; below it the answer is exact.
_STATES = 1 << 15


def allocate(cost: Tensor, loss: Tensor, budget: float) -> Tensor:
    """The candidate of every item (items,) with least summed loss and summed cost <= budget.

    cost and loss (items, candidates). Exact unless more than 32,768 partial choices stay open,
    then nearly so. Raises ValueError where even the cheapest candidates cost more than the budget.
    """
    if cost.dim() != 2 or cost.shape != loss.shape or not cost.numel():
        raise ValueError(
            f"cost and loss must be (items, candidates), got {tuple(cost.shape)} and "
            f"{tuple(loss.shape)}"
        )
    cost, loss = cost.double(), loss.double()
    # Sums in another order round otherwise: what fits exactly must not fail for that.
    room = budget + 1e-9 * max(1.0, float(cost.abs().sum()))
    if float(cost.amin(1).sum()) > room:
        raise ValueError(f"the cheapest choice costs {float(cost.amin(1).sum())}, over {budget}")
    price = _price(cost, loss, room)
    best = _improved(_cheapest(cost, loss, price), cost, loss, room)
    return _searched(best, cost, loss, room, price)


def _total(x: Tensor, choice: Tensor) -> float:
    return float(x.gather(1, choice[:, None]).sum())


def _cheapest(cost: Tensor, loss: Tensor, price: float) -> Tensor:
    """The best choice (items,) where a unit of cost is worth `price` of loss; ties to low cost."""
    value = loss + price * cost if price < float("inf") else cost
    tied = value <= value.amin(1, keepdim=True)
    return cost.masked_fill(~tied, float("inf")).argmin(1)


def _price(cost: Tensor, loss: Tensor, room: float) -> float:
    """The lowest price, nearly, at which the best choice is affordable."""
    if _total(cost, _cheapest(cost, loss, 0.0)) <= room:
        return 0.0
    low, high = 0.0, 1.0
    while _total(cost, _cheapest(cost, loss, high)) > room and high < 1e30:
        low, high = high, 4 * high
    if high >= 1e30:
        return float("inf")
    for _ in range(60):
        middle = (low + high) / 2
        fits = _total(cost, _cheapest(cost, loss, middle)) <= room
        low, high = (low, middle) if fits else (middle, high)
    return high


def _improved(choice: Tensor, cost: Tensor, loss: Tensor, room: float) -> Tensor:
    """A choice with the single changes made, best first, that what is left of the budget allows."""
    choice = choice.clone()
    while True:
        left = room - _total(cost, choice)
        gain = loss.gather(1, choice[:, None]) - loss
        gain[cost - cost.gather(1, choice[:, None]) > left] = 0
        if float(gain.max()) <= 0:
            return choice
        item, candidate = divmod(int(gain.argmax()), cost.shape[1])
        choice[item] = candidate


def _searched(best: Tensor, cost: Tensor, loss: Tensor, room: float, price: float) -> Tensor:
    """Branch and bound, item by item: partial choices that neither dominate nor can win are left.

    The bound is Lagrange's: no completion loses less than the best one at `price`, less the price
    of the whole budget.
    """
    price = 0.0 if price == float("inf") else price
    after_loss, after_cost = _after((loss + price * cost).amin(1)), _after(cost.amin(1))
    limit = _total(loss, best)
    spent, lost = cost.new_zeros(1), loss.new_zeros(1)
    steps = []
    for i in range(len(cost)):
        paid, missed = (spent[:, None] + cost[i]).flatten(), (lost[:, None] + loss[i]).flatten()
        bound = missed + price * (paid - room) + after_loss[i + 1]
        open_ = ((paid + after_cost[i + 1] <= room) & (bound < limit)).nonzero()[:, 0]
        open_ = open_[missed[open_].argsort(stable=True)]
        open_ = open_[paid[open_].argsort(stable=True)]
        lowest = torch.cummin(missed[open_], 0).values if open_.numel() else missed[:0]
        first = torch.ones_like(open_, dtype=torch.bool)
        first[1:] = missed[open_][1:] < lowest[:-1]
        open_ = open_[first]
        if open_.numel() > _STATES:
            open_ = open_[bound[open_].topk(_STATES, largest=False).indices]
        if not open_.numel():
            return best
        steps.append((open_ // cost.shape[1], open_ % cost.shape[1]))
        spent, lost = paid[open_], missed[open_]
    at, choice = int(lost.argmin()), best.clone()
    for i in range(len(cost) - 1, -1, -1):
        parent, candidate = steps[i]
        choice[i], at = candidate[at], int(parent[at])
    return choice


def _after(x: Tensor) -> Tensor:
    """Sums of the items from each one on (items + 1,)."""
    return torch.cat((x.flip(0).cumsum(0).flip(0), x.new_zeros(1)))
