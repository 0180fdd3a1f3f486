import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.bench.tune.allocate import allocate


def brute(cost, loss, budget):
    """The least loss over all choices that the budget allows."""
    best = float("inf")
    for choice in itertools.product(range(cost.shape[1]), repeat=len(cost)):
        rows = list(zip(range(len(cost)), choice, strict=True))
        if sum(float(cost[at]) for at in rows) <= budget + 1e-9:
            best = min(best, sum(float(loss[at]) for at in rows))
    return best


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.booleans())
def test_equals_trying_everything(seed, items, candidates, share, whole):
    g = torch.Generator().manual_seed(seed)
    cost, loss = (torch.rand(items, candidates, generator=g, dtype=torch.float64) for _ in "ab")
    if whole:
        cost, loss = (10 * cost).floor(), (10 * loss).floor()
    low, high = float(cost.amin(1).sum()), float(cost.amax(1).sum())
    budget = low + share * (high - low)
    choice = allocate(cost, loss, budget)
    at = choice[:, None]
    assert float(cost.gather(1, at).sum()) <= budget + 1e-6
    assert float(loss.gather(1, at).sum()) == pytest.approx(brute(cost, loss, budget), abs=1e-9)


def test_many_items_come_within_the_gap_that_the_price_leaves():
    g = torch.Generator().manual_seed(0)
    cost = torch.rand(90, 40, generator=g).sort(1).values.double()
    loss = (torch.rand(90, 40, generator=g).sort(1, descending=True).values ** 2).double()
    choice = allocate(cost, loss, 45.0)[:, None]
    assert float(cost.gather(1, choice).sum()) <= 45 + 1e-6
    # No choice loses less than any price says: Lagrange's bound, here on a fine grid of prices.
    bound = max(float((loss + x * cost).amin(1).sum()) - 45 * x for x in torch.linspace(0, 3, 3001))
    assert bound <= float(loss.gather(1, choice).sum()) < bound + 0.01


def test_heterogeneous_plans_are_never_worse_than_one_candidate_for_all():
    g = torch.Generator().manual_seed(1)
    cost = torch.arange(1.0, 9.0).expand(12, 8)
    loss = torch.rand(12, 8, generator=g).sort(1, descending=True).values
    for same in range(8):
        choice = allocate(cost, loss, 12.0 * (same + 1))
        assert loss.gather(1, choice[:, None]).sum() <= loss[:, same].sum() + 1e-6


def test_refuses_what_cannot_be_paid_and_wrong_shapes():
    with pytest.raises(ValueError, match="cheapest"):
        allocate(torch.ones(3, 2), torch.ones(3, 2), 2.0)
    with pytest.raises(ValueError, match="items, candidates"):
        allocate(torch.ones(3), torch.ones(3), 2.0)
