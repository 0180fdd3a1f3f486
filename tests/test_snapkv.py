import pytest
import torch

import foveate
from attached import (
    check_bytes,
)

SMALL = "snapkv:budget=12,window=4,pool=3"


def case(n=40, queries=40, q_heads=4, kv_heads=2, dim=8, seed=0):
    torch.manual_seed(seed)
    return torch.randn(1, q_heads, queries, dim), torch.randn(1, kv_heads, n, dim)


def kept(policy, q, k):
    """Slots that stay, a list for every kv head."""
    chosen = policy.keep(policy.score(q, k, {}, scale=None))
    return [row.nonzero()[:, 0] for row in chosen]


def votes_of(q, k, window):
    """Plain reference: mean attention of the last queries to earlier tokens, (Hkv, n - window)."""
    n, group = k.shape[2], q.shape[1] // k.shape[1]
    rows = []
    for h in range(k.shape[1]):
        total = torch.zeros(n)
        for head in range(h * group, (h + 1) * group):
            for back in range(min(window, q.shape[2])):
                logits = k[0, h, : n - back] @ q[0, head, -1 - back] * q.shape[3] ** -0.5
                total[: n - back] += torch.softmax(logits, 0)
        rows.append(total[: n - window])
    return torch.stack(rows)


@pytest.mark.parametrize("queries", [40, 3])
def test_keeps_the_window_and_the_tokens_its_queries_vote_for(queries):
    q, k = case(queries=queries)
    slots = torch.stack(kept(foveate.create("snapkv", budget=12, window=5, pool=1), q, k))
    best = votes_of(q, k, 5).topk(7).indices.sort().values
    assert torch.equal(slots[:, :7], best)
    assert slots[:, 7:].tolist() == [[35, 36, 37, 38, 39]] * 2


@pytest.mark.parametrize("smooth", ["avg", "max"])
def test_smoothing_keeps_the_neighbours_of_a_winner(smooth):
    q, k = torch.zeros(1, 2, 30, 8), torch.zeros(1, 1, 30, 8)
    q[..., 0], k[:, :, 11, 0] = 1, 50
    policy = foveate.create("snapkv", budget=9, window=4, pool=5, smooth=smooth)
    assert kept(policy, q, k)[0].tolist() == [9, 10, 11, 12, 13, 26, 27, 28, 29]


def test_kv_heads_keep_different_tokens():
    q, k = case()
    slots = kept(foveate.create(SMALL), q, k)
    assert [len(x) for x in slots] == [12, 12]
    assert not torch.equal(slots[0], slots[1])


def test_a_shared_budget_goes_where_the_votes_are():
    q, k = case(n=60, queries=60)
    k[:, 0] *= 4  # sharp attention in one head, flat attention in the other
    equal, shared = (
        kept(foveate.create("snapkv", budget=16, window=4, pool=1, floor=floor), q, k)
        for floor in (1.0, 0.5)
    )
    votes = votes_of(q, k, 4)
    mass = [sum(float(votes[h, x[x < 56]].sum()) for h, x in enumerate(s)) for s in (shared, equal)]
    assert sum(map(len, shared)) == sum(map(len, equal)) == 32
    assert min(map(len, shared)) >= 8 and len(shared[0]) != len(shared[1])
    assert mass[0] > mass[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 32}, "window must be below the budget 32"),
        ({"pool": 4}, "pool must be odd, got 4"),
        ({"smooth": "mean"}, "smooth must be avg or max"),
        ({"window": 0}, "window must be at least 1"),
        ({"floor": 0.0}, "floor must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        foveate.create("snapkv", **options)


@pytest.mark.parametrize("prompt_length", [30, 8])
def test_bytes_held_are_those_claimed_at_every_step(tiny_llama, prompt_length):
    check_bytes(tiny_llama, foveate.create(SMALL), prompt_length)
