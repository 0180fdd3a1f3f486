import pytest
import torch

from foveate.tasks.mqar import mqar


@pytest.mark.parametrize("passes", [1, 3])
def test_every_key_is_asked_once_and_its_value_is_the_target(passes):
    batch = mqar(50, seed=0, length=96, pairs=8, vocabulary=256, passes=passes)
    start = 16 * passes
    assert (batch.mask.sum(1) == 8).all() and not batch.mask[:, :start].any()
    assert not batch.mask[:, 1::2].any()
    for row, target, mask in zip(*batch, strict=True):
        block = row[:start].view(passes, 8, 2)
        assert (block == block[0]).all()
        values = dict(block[0].tolist())
        asked = row[mask].tolist()
        assert sorted(asked) == sorted(values)
        assert target[mask].tolist() == [values[key] for key in asked]
        assert (target[~mask] == 0).all()


def test_keys_and_values_are_distinct_and_from_their_halves():
    batch = mqar(100, seed=1, length=64, pairs=16, vocabulary=128)
    keys, values = batch.inputs[:, 0:32:2], batch.inputs[:, 1:32:2]
    for drawn, low, high in ((keys, 1, 64), (values, 64, 128)):
        assert drawn.min() >= low and drawn.max() < high
        assert (drawn.sort(1).values.diff(dim=1) > 0).all()
        assert drawn.unique().numel() > (high - low) * 0.9


def test_seeds_reproduce_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two, other = (mqar(4, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.inputs, two.inputs) and torch.equal(one.targets, two.targets)
    assert not torch.equal(one.inputs, other.inputs)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_filler_all_else_is_0():
    batch = mqar(20, seed=0, filler=False)
    assert (batch.inputs[:, 16:][~batch.mask[:, 16:]] == 0).all()
    filled = mqar(200, seed=0)
    rest = filled.inputs[:, 16:][~filled.mask[:, 16:]]
    assert rest.unique().numel() == 256


def test_questions_lie_near_the_pairs_unless_spread_is_1():
    at = {s: mqar(4000, seed=0, pairs=1, spread=s).mask.float().mean(0)[2::2] for s in (0.01, 1.0)}
    slots = torch.arange(1, 32, dtype=torch.float64)
    want = slots ** (0.01 - 1)
    torch.testing.assert_close(at[0.01].double(), want / want.sum(), atol=0.03, rtol=0)
    torch.testing.assert_close(
        at[1.0].double(), torch.full((31,), 1 / 31).double(), atol=0.02, rtol=0
    )


def test_scores_count_only_asked_positions():
    batch = mqar(8, seed=0)
    right = torch.nn.functional.one_hot(batch.targets, 256).float() * 50
    assert batch.accuracy(right) == 1 and float(batch.loss(right)) < 1e-6
    wrong = right.clone()
    wrong[~batch.mask] = torch.randn_like(wrong[~batch.mask]) * 100
    assert batch.accuracy(wrong) == 1
    torch.testing.assert_close(batch.loss(torch.zeros_like(right)), torch.tensor(256.0).log())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 30}, "at least 32, got 30"),
        ({"length": 65}, "even"),
        ({"vocabulary": 64}, "above the length 64"),
        ({"passes": 4}, "at least 80"),
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"spread": 0.0}, "spread"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        mqar(2, seed=0, **options)
