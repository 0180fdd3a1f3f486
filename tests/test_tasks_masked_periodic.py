import itertools

import pytest
import torch

from foveate.tasks.masked_periodic import masked_periodic, posterior, unmask


def test_rows_repeat_and_masked_positions_count():
    batch = masked_periodic(500, seed=0)
    assert torch.equal(batch.inputs == 16, batch.mask)
    assert torch.equal(batch.inputs[~batch.mask], batch.targets[~batch.mask])
    repeats = torch.stack(
        [(batch.targets[:, p:] == batch.targets[:, :-p]).all(1) for p in range(3, 8)], 1
    )
    assert repeats.any(1).all() and (repeats.sum(0) >= 60).all()
    share = batch.mask.float().mean(1)
    assert 0.13 < share.min() < 0.2 and 0.45 < share.max() < 0.52
    assert batch.targets.unique().tolist() == list(range(16))


def test_the_posterior_is_that_of_every_row_there_is():
    """All rows of length 5 over 2 tokens with periods 2 and 3, each with its probability."""
    chance = {}
    for period in (2, 3):
        for block in itertools.product(range(2), repeat=period):
            row = tuple(block[i % period] for i in range(5))
            chance[row] = chance.get(row, 0) + 0.5 * 2.0**-period
    inputs = torch.tensor(list(itertools.product(range(3), repeat=5)))
    for seen in inputs:
        fits = {
            row: p
            for row, p in chance.items()
            if all(s in (2, t) for s, t in zip(seen.tolist(), row, strict=True))
        }
        if not fits:
            continue
        want = torch.zeros(5, 2, dtype=torch.float64)
        for row, p in fits.items():
            want[torch.arange(5), list(row)] += p / sum(fits.values())
        got = posterior(seen[None], vocabulary=2, periods=(2, 3))[0]
        torch.testing.assert_close(got, want)


def test_the_best_accuracy_is_what_the_posterior_says():
    batch = masked_periodic(2000, seed=1)
    known = posterior(batch.inputs)
    torch.testing.assert_close(known.sum(-1), torch.ones(2000, 32).double())
    expected = float(known.max(-1).values[batch.mask].mean())
    assert abs(batch.accuracy(known) - expected) < 0.01 and 0.9 < expected < 1


def test_all_masked_leaves_chance():
    batch = masked_periodic(2000, seed=2, masked=(1.0, 1.0))
    assert batch.mask.all()
    known = posterior(batch.inputs)
    torch.testing.assert_close(known, torch.full_like(known, 1 / 16))
    assert abs(batch.accuracy(known) - 1 / 16) < 0.01


@pytest.mark.parametrize("steps", [1, 3, 8, 50])
def test_unmasking_fills_the_surest_first_in_equal_parts(steps):
    batch = masked_periodic(100, seed=3)
    states = unmask(lambda rows: posterior(rows).log(), batch.inputs, steps=steps)
    assert len(states) == steps + 1 and torch.equal(states[0], batch.inputs)
    assert (states[-1] < 16).all()
    left = torch.stack([(state == 16).sum(1) for state in states], 1)
    filled = left[:, :-1] - left[:, 1:]
    assert (filled.max(1).values - filled.min(1).values <= 1).all()
    assert (filled.diff(dim=1) <= 0).all()
    for before, after in itertools.pairwise(states):
        known, kept = posterior(before), before != 16
        assert torch.equal(before[kept], after[kept])
        sure = known.max(-1).values
        new, still = (after != 16) & ~kept, after == 16
        lowest = sure.masked_fill(~new, 2).min(1).values
        highest = sure.masked_fill(~still, -1).max(1).values
        assert (lowest >= highest - 1e-12).all()
        assert torch.equal(known.argmax(-1)[new], after[new])


def test_more_steps_keep_the_period_better():
    batch = masked_periodic(300, seed=4, masked=(0.9, 0.9))

    def periodic(rows):
        fits = [(rows[:, p:] == rows[:, :-p]).all(1) for p in range(3, 8)]
        return float(torch.stack(fits).any(0).float().mean())

    share = [
        periodic(unmask(lambda rows: posterior(rows).log(), batch.inputs, steps=s)[-1])
        for s in (1, 29)
    ]
    assert share[0] < 0.5 and share[1] == 1


def test_seeds_reproduce_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two, other = (masked_periodic(4, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.inputs, other.inputs)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"vocabulary": 1}, "vocabulary must be at least 2"),
        ({"periods": (0, 3)}, r"rise from 1 to at most the length 32, got \(0, 3\)"),
        ({"periods": (3, 40)}, "at most the length"),
        ({"masked": (0.0, 0.5)}, r"masked must rise .* got \(0.0, 0.5\)"),
        ({"masked": (0.6, 0.5)}, "masked must rise"),
    ],
)
def test_refuses_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        masked_periodic(**{"rows": 2, "seed": 0} | options)


def test_refuses_rows_without_a_period_and_no_steps():
    with pytest.raises(ValueError, match="none of the periods 3 to 7"):
        posterior(torch.arange(14).remainder(11)[None])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        unmask(lambda rows: rows, torch.zeros(1, 4).long(), steps=0)
