import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops

cases = st.tuples(
    st.integers(0, 10**6),
    st.sampled_from([(1, 1, 4, 6), (2, 3, 5, 5), (1, 2, 1, 9)]),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.booleans(),
)


def drawn(case):
    """Scores, with ties when coarse, and what is visible of them."""
    seed, shape, hidden, coarse = case
    make = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape, generator=make)
    scores = (scores * 4).floor() / 4 if coarse else scores
    return scores, torch.rand(shape, generator=make) >= hidden


def ranked(scores, visible):
    """Visible places of a list by falling score, ties to the lower index."""
    return sorted((i for i, seen in enumerate(visible) if seen), key=lambda i: (-scores[i], i))


def naive_top_k(scores, visible, k):
    kept = set(ranked(scores, visible)[:k])
    return [i in kept for i in range(len(scores))]


def naive_top_p(probs, visible, p, crossing):
    order = ranked(probs, visible)
    total, mass, kept = sum(probs[i] for i in order), 0.0, set()
    for rank, i in enumerate(order):
        reached = mass >= p * total if crossing == "include" else mass + probs[i] > p * total
        if rank > 0 and (reached or probs[i] == 0):
            break
        kept.add(i)
        mass += probs[i]
    return [i in kept for i in range(len(probs))]


@settings(max_examples=60, deadline=None)
@given(cases, st.integers(1, 10))
def test_top_k_keeps_the_best(case, k):
    scores, visible = drawn(case)
    got = ops.top_k(scores, k, visible=visible)
    rows = zip(got.flatten(0, 2), scores.flatten(0, 2), visible.flatten(0, 2), strict=True)
    for kept, row, seen in rows:
        assert kept.tolist() == naive_top_k(row.tolist(), seen.tolist(), k)


@settings(max_examples=30, deadline=None)
@given(cases, st.integers(0, 10**6))
def test_top_k_takes_a_budget_per_row(case, seed):
    scores, visible = drawn(case)
    budget = torch.randint(0, 7, scores.shape[:3], generator=torch.Generator().manual_seed(seed))
    got = ops.top_k(scores, budget, visible=visible)
    assert torch.equal(got.sum(-1), torch.minimum(budget, visible.sum(-1)))
    one = ops.top_k(scores, budget[:, :1, :1], visible=visible)
    assert torch.equal(one.sum(-1), torch.minimum(budget[:, :1, :1], visible.sum(-1)))


@settings(max_examples=80, deadline=None)
@given(
    cases,
    st.sampled_from([0.01, 0.25, 0.5, 0.9, 0.999]),
    st.sampled_from(["include", "exclude"]),
    st.sampled_from(["row", "head"]),
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(case, p, crossing, scope):
    scores, visible = drawn(case)
    scores = (scores * 64).round().double() / 64  # sums are exact: the order of adding is free
    got = ops.top_p(scores, p, crossing=crossing, scope=scope, visible=visible)
    lists = (
        x.flatten(2).flatten(0, 1) if scope == "head" else x.flatten(0, 2)
        for x in (got, scores, visible)
    )
    for kept, row, seen in zip(*lists, strict=True):
        assert kept.tolist() == naive_top_p(row.tolist(), seen.tolist(), p, crossing)


def test_top_p_of_one_keeps_everything_visible():
    scores, visible = drawn((0, (1, 2, 4, 6), 0.4, False))
    assert torch.equal(ops.top_p(scores, 1.0, visible=visible), visible)
    assert ops.top_p(scores, 2.0).all()


@pytest.mark.parametrize("crossing", ["include", "exclude"])
@pytest.mark.parametrize("scope", ["row", "head"])
def test_top_p_keeps_something_where_all_mass_is_zero(crossing, scope):
    visible = torch.tensor([[False, True, True], [False, False, True]])
    got = ops.top_p(torch.zeros(2, 3), 0.5, crossing=crossing, scope=scope, visible=visible)
    if scope == "row":
        assert got.tolist() == [[False, True, False], [False, False, True]]
    else:
        assert got.tolist() == [[False, True, False], [False, False, False]]
    nothing = ops.top_p(torch.ones(2, 3), 0.5, scope=scope, visible=torch.zeros(2, 3).bool())
    assert not nothing.any()


def test_crossing_decides_over_the_entry_that_crosses():
    probs = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert ops.top_p(probs, 0.6).tolist() == [True, True, False, False]
    assert ops.top_p(probs, 0.6, crossing="exclude").tolist() == [True, False, False, False]
    assert ops.top_p(probs, 0.75).tolist() == [True, True, False, False]
    assert ops.top_p(probs, 0.75, crossing="exclude").tolist() == [True, True, False, False]
    assert ops.top_p(probs, 0.1, crossing="exclude").tolist() == [True, False, False, False]


def test_head_scope_lets_rows_share_one_budget():
    probs = torch.tensor([[0.9, 0.1], [0.05, 0.05]])
    assert ops.top_p(probs, 0.5, scope="head").tolist() == [[True, False], [False, False]]
    assert ops.top_p(probs, 0.5, scope="row").tolist() == [[True, False], [True, False]]


def test_threshold_keeps_what_reaches_it():
    scores, visible = drawn((1, (1, 2, 4, 6), 0.4, True))
    assert torch.equal(ops.threshold(scores, 0.5, visible=visible), (scores >= 0.5) & visible)
    assert torch.equal(ops.threshold(scores, 0.5), scores >= 0.5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_force_adds_first_local_and_last_rows(seed, first, local, last_rows):
    make = torch.Generator().manual_seed(seed)
    chosen = torch.rand(2, 3, 5, 7, generator=make) < 0.3
    visible = torch.ones(5, 7).tril(2).bool() & (torch.rand(5, 7, generator=make) < 0.8)
    got = ops.force(chosen, visible, first=first, local=local, last_rows=last_rows)
    for i in range(5):
        seen = [j for j in range(7) if visible[i, j]]
        for j in range(7):
            must = j < first or (seen and j > seen[-1] - local) or i >= 5 - last_rows
            want = (chosen[..., i, j] | bool(must)) & visible[i, j]
            assert torch.equal(got[..., i, j], want)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: ops.top_k(x, 0), ValueError, "k must be at least 1, got 0"),
        (lambda x: ops.top_k(x, 1.5), TypeError, "k must be an integer, got 1.5"),
        (lambda x: ops.top_p(x, 0.0), ValueError, "p must be above 0, got 0.0"),
        (lambda x: ops.top_p(x, 0.5, crossing="drop"), ValueError, "crossing must be .* 'drop'"),
        (lambda x: ops.top_p(x, 0.5, scope="batch"), ValueError, "scope .* 'batch'"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.rand(2, 3))


@settings(max_examples=30, deadline=None)
@given(cases, st.sampled_from(["include", "exclude"]), st.integers(0, 10**6))
def test_top_p_takes_a_share_per_head(case, crossing, seed):
    scores, visible = drawn(case)
    heads = scores.shape[1]
    make = torch.Generator().manual_seed(seed)
    shares = torch.rand(heads, generator=make) * 1.5 + 0.01
    got = ops.top_p(scores, shares[:, None], crossing=crossing, visible=visible)
    for h in range(heads):
        alone = ops.top_p(
            scores[:, h : h + 1], float(shares[h]), crossing=crossing, visible=visible[:, h : h + 1]
        )
        assert torch.equal(got[:, h : h + 1], alone)
