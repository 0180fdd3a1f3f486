import pytest
import torch

from foveate.tasks.copying import BLANK, MARK, copying, selective_copying


@pytest.mark.parametrize("task", [copying, selective_copying])
def test_answers_are_the_symbols_in_order(task):
    batch = task(200, seed=0, symbols=5, delay=11, vocabulary=9)
    assert batch.inputs.shape == (200, 21) and (batch.mask.sum(1) == 5).all()
    assert (batch.inputs[:, 16:] == MARK).all() and batch.mask[:, 16:].all()
    for row, target in zip(batch.inputs, batch.targets, strict=True):
        symbols = row[:16][row[:16] != BLANK]
        assert symbols.tolist() == target[16:].tolist() and len(symbols) == 5
    assert batch.targets[batch.mask].unique().tolist() == list(range(2, 9))


def test_symbols_stand_at_the_start_or_anywhere():
    plain = copying(50, seed=0, symbols=5, delay=11)
    assert (plain.inputs[:, 5:16] == BLANK).all()
    places = selective_copying(4000, seed=0, symbols=5, delay=11).inputs[:, :16] != BLANK
    torch.testing.assert_close(places.float().mean(0), torch.full((16,), 5 / 16), atol=0.04, rtol=0)


@pytest.mark.parametrize("task", [copying, selective_copying])
def test_seeds_reproduce_and_sizes_are_checked(task):
    before = torch.random.get_rng_state()
    one, two, other = (task(4, seed=s).inputs for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    for options, said in (
        ({"symbols": 0}, "symbols must be at least 1"),
        ({"delay": -1}, "delay must be at least 0"),
        ({"vocabulary": 3}, "vocabulary must be at least 4"),
    ):
        with pytest.raises(ValueError, match=said):
            task(2, seed=0, **options)
