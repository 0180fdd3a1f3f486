import pytest
import torch

from foveate.tasks.scan_snap import context_table, scan_snap


def test_distinct_tokens_serve_one_next_token_and_common_ones_all():
    table = context_table()
    assert table.shape == (1, 2, 30)
    torch.testing.assert_close(table.sum(-1), torch.ones(1, 2))
    serves = table[0] > 0
    assert serves[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, *range(12, 20)]
    assert serves[1].nonzero()[:, 0].tolist() == [6, 7, 8, 9, 10, 11, *range(12, 20)]
    rising = torch.tensor([0.5, 0.8, 1.1, 1.4, 1.7, 2.0])
    for row, own in ((table[0, 0], slice(0, 6)), (table[0, 1], slice(6, 12))):
        torch.testing.assert_close(row[own], rising / 19.5)
        torch.testing.assert_close(row[12:20], torch.full((8,), 1.5 / 19.5))


def test_pairs_of_several_last_tokens_differ():
    table = context_table(last_tokens=3, next_tokens=3, distinct=4, common=5, vocabulary=20)
    rows = {tuple(row) for row in table.flatten(0, 1).tolist()}
    assert len(rows) == 9
    assert torch.equal(table[0, 0] > 0, table[2, 0] > 0)
    assert not table[..., 17:].any()


def test_rows_follow_the_table_and_end_in_their_last_token():
    table = context_table(last_tokens=2)
    batch = scan_snap(table, 4000, seed=0)
    assert batch.inputs.shape == (4000, 32)
    assert torch.equal(batch.mask.nonzero()[:, 1], torch.full((4000,), 31))
    last, following = batch.inputs[:, -1] - 28, batch.targets[:, -1]
    assert (batch.targets[:, :-1] == 0).all()
    for m in range(2):
        for n in range(2):
            context = batch.inputs[(last == m) & (following == n), :-1]
            assert 850 < len(context) < 1150
            share = context.flatten().bincount(minlength=30) / context.numel()
            torch.testing.assert_close(share, table[m, n], atol=0.01, rtol=0)


def test_a_context_of_32_tells_its_next_token_and_concentrates():
    table = context_table()
    sure, spread = {}, {}
    for length in (4, 32):
        batch = scan_snap(table, 3000, seed=1, length=length)
        context, following = batch.inputs[:, :-1], batch.targets[:, -1]
        own = torch.stack([((context >= 6 * n) & (context < 6 * n + 6)).sum(1) for n in (0, 1)], 1)
        right = own.gather(1, following[:, None])[:, 0]
        assert torch.equal(right, own.sum(1))
        sure[length] = float((right > 0).float().mean())
        seen = torch.nn.functional.one_hot(context, 30).float().mean(1)
        spread[length] = float((seen - table[0, following]).abs().sum(1).mean() / 2)
    assert sure[32] == 1 and sure[4] < 0.9
    assert spread[32] < 0.5 * spread[4]


def test_seeds_reproduce_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two, other = (scan_snap(context_table(), 4, seed=s).inputs for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vocabulary": 20}, "12 distinct, 8 common and 1 last tokens: at least 21, got 20"),
        ({"distinct": 0}, "distinct must be at least 1"),
        ({"common": -1}, "common must be at least 0"),
        ({"weights": (0.0, 1.0)}, "weights must be above 0"),
    ],
)
def test_refuses_tables_that_do_not_fit(options, says):
    with pytest.raises(ValueError, match=says):
        context_table(**options)


def test_refuses_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        scan_snap(context_table(), 1, seed=0, length=1)
    with pytest.raises(ValueError, match=r"got \(2, 30\)"):
        scan_snap(context_table()[0], 1, seed=0)
