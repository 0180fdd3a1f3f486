import pytest
import torch

from foveate.tasks.planted_token import PADDING, planted_token


def test_planted_words_decide_the_class():
    batch = planted_token(1000, seed=0)
    positive = (batch.inputs >= 1) & (batch.inputs <= 5)
    negative = (batch.inputs >= 6) & (batch.inputs <= 10)
    assert torch.equal(positive.any(1).long(), batch.truth)
    assert torch.equal(negative.any(1).long(), 1 - batch.truth)
    assert torch.equal(positive | negative, batch.planted)
    assert set(batch.planted.sum(1).tolist()) == {1, 2, 3}
    assert batch.inputs[batch.planted].unique().tolist() == list(range(1, 11))
    assert 430 < int(batch.truth.sum()) < 570


def test_a_count_of_words_is_always_right():
    batch = planted_token(500, seed=1)
    votes = torch.zeros(500, dtype=torch.long)
    votes[1:6], votes[6:11] = 1, -1
    score = votes[batch.inputs].sum(1).float()
    assert batch.accuracy(torch.stack((-score, score), 1)) == 1
    assert batch.accuracy(torch.stack((score, -score), 1)) == 0
    assert torch.equal(batch.labels, batch.truth)


def test_lengths_and_padding():
    batch = planted_token(2000, seed=2)
    lengths = batch.valid.sum(1)
    assert (lengths.min(), lengths.max(), batch.inputs.shape[1]) == (20, 40, 40)
    assert torch.equal(batch.valid, torch.arange(40) < lengths[:, None])
    assert torch.equal(batch.inputs == PADDING, ~batch.valid)
    assert batch.inputs.max() == 499 and (batch.planted <= batch.valid).all()
    first = torch.where(batch.planted, torch.arange(40), 99).min(1).values / lengths
    assert first.min() < 0.02 and first.max() > 0.9


def test_mass_counts_planted_words_alone():
    batch = planted_token(50, seed=3)
    uniform = batch.valid / batch.valid.sum(1, keepdim=True)
    torch.testing.assert_close(batch.mass(uniform), batch.planted.sum(1) / batch.valid.sum(1))
    heads = torch.stack((batch.planted / batch.planted.sum(1, keepdim=True), uniform))
    heads[1] = heads[1].masked_fill(batch.planted, 0)
    torch.testing.assert_close(batch.mass(heads), torch.tensor([[1.0], [0.0]]).expand(2, 50))


def test_a_hint_tells_the_class_with_its_probability():
    batch = planted_token(4000, seed=4, words=1, hint=0.8)
    assert set(batch.inputs[batch.planted].tolist()) == {1, 2}
    hints = [(batch.inputs == token).sum(1) for token in (3, 4)]
    assert torch.equal(hints[0] + hints[1], torch.ones(4000, dtype=torch.long))
    right = float((hints[1] == batch.truth).float().mean())
    assert abs(right - 0.8) < 0.03
    plain = planted_token(4000, seed=4, words=1)
    told = ((plain.inputs == 4).any(1) == plain.truth.bool()).float().mean()
    assert abs(float(told) - 0.5) < 0.05


def test_noise_turns_labels_and_unlabelled_rows_have_none():
    batch = planted_token(4000, seed=5, noise=0.1, labelled=3000)
    assert (batch.labels[3000:] == -1).all()
    turned = batch.labels[:3000] != batch.truth[:3000]
    assert abs(float(turned.float().mean()) - 0.1) < 0.02
    assert torch.equal(batch.inputs, planted_token(4000, seed=5).inputs)


def test_seeds_reproduce_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two, other = (planted_token(4, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.inputs, other.inputs)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"words": 0}, "words must be at least 1"),
        ({"lengths": (3, 9)}, r"at least 4, got \(3, 9\)"),
        ({"lengths": (9, 8)}, "lengths must rise"),
        ({"vocabulary": 11}, "vocabulary must be above 11, got 11"),
        ({"hint": 1.2}, r"hint must be in \[0, 1\], got 1.2"),
        ({"noise": -0.1}, "noise must be in"),
        ({"labelled": 5}, "labelled must be from 0 to the 2 rows, got 5"),
    ],
)
def test_refuses_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        planted_token(**{"rows": 2, "seed": 0} | options)
