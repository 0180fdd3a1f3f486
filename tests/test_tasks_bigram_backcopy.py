import pytest
import torch

from foveate.tasks.bigram_backcopy import bigram_backcopy, chain, dirichlet_chain


@pytest.fixture(scope="module")
def made():
    return dirichlet_chain(32, seed=0)


def test_triggers_are_the_most_frequent_tokens(made):
    step = made.transition[:-1]
    frequent = torch.full((1, 32), 1 / 32, dtype=torch.float64) @ torch.matrix_power(step, 4096)
    assert set(made.triggers.tolist()) == set(frequent[0].topk(3).indices.tolist())
    without = frequent[0].index_fill(0, made.triggers, 0)
    torch.testing.assert_close(made.transition[-1], without / without.sum())


def test_a_chain_of_period_two_has_its_stationary_distribution():
    swap = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    made = chain(swap, triggers=1)
    assert made.triggers.tolist() == [0]
    torch.testing.assert_close(made.transition[-1], torch.tensor([0.0, 0.5, 0.5]).double())


def test_after_a_trigger_comes_the_token_before_it(made):
    batch = bigram_backcopy(made, 200, seed=0)
    assert batch.inputs.shape == batch.targets.shape == (200, 48) and batch.mask.all()
    assert (batch.inputs[:, 0] == made.start).all() and (batch.inputs[:, 1:] < 32).all()
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    trigger = made.is_trigger(batch)
    assert trigger.sum() > 500
    row, at = trigger.nonzero().T
    assert torch.equal(batch.targets[row, at], batch.inputs[row, at - 1])
    assert not trigger[:, :2].any()  # never the start, never the first after it
    assert not (trigger[:, 1:] & trigger[:, :-1]).any()


def test_other_tokens_follow_the_chain(made):
    batch = bigram_backcopy(made, 3000, seed=1)
    plain = ~made.is_trigger(batch)
    counts = torch.zeros(33, 32, dtype=torch.float64)
    ones = torch.ones(int(plain.sum()), dtype=torch.float64)
    counts.index_put_((batch.inputs[plain], batch.targets[plain]), ones, accumulate=True)
    visits = counts.sum(1, keepdim=True)
    spread = (made.transition * (1 - made.transition) / visits.clamp_min(1)).sqrt()
    error = (counts / visits.clamp_min(1) - made.transition).abs()
    often = visits[:, 0] >= 500
    assert often.sum() >= 25
    assert (error <= (5 * spread + 1e-3))[often].all()
    assert error[often].mean() < 0.02
    assert not visits[made.triggers].any()


def test_excess_is_zero_for_the_rule_and_the_right_entropy_for_a_guess(made):
    batch = bigram_backcopy(made, 500, seed=2)
    rule = made.transition[batch.inputs].clamp_min(1e-30)
    trigger = made.is_trigger(batch)
    rule[trigger] = torch.nn.functional.one_hot(batch.targets, 32)[trigger].double() + 1e-30
    on, off = made.excess(batch, rule.log())
    assert on < 1e-6 and abs(off) < 0.03
    on, off = made.excess(batch, torch.zeros(500, 48, 33))
    rows = made.transition[batch.inputs[~trigger]]
    entropy = -(rows * rows.clamp_min(1e-300).log()).sum(1).mean()
    guess = torch.tensor(33.0).log()
    assert abs(on - float(guess)) < 1e-5 and abs(off - float(guess - entropy)) < 1e-5


def test_seeds_reproduce_and_leave_the_global_generator_alone(made):
    before = torch.random.get_rng_state()
    one, two, other = (bigram_backcopy(made, 4, seed=s).inputs for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    again, another = (dirichlet_chain(32, seed=s).transition for s in (0, 1))
    assert torch.equal(made.transition[:-1], again[:-1]) and not torch.equal(again, another)
    torch.testing.assert_close(made.transition[-1], again[-1], atol=1e-12, rtol=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_refuses_bad_input(made):
    with pytest.raises(ValueError, match=r"square with rows that sum to 1, got \(2, 3\)"):
        chain(torch.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match="with sums from 0"):
        chain(torch.tensor([[0.5, 0.0], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="fewer than the 4 tokens, got 4"):
        dirichlet_chain(4, seed=0, triggers=4)
    with pytest.raises(ValueError, match="triggers must be at least 1, got 0"):
        dirichlet_chain(4, seed=0, triggers=0)
    with pytest.raises(ValueError, match="concentration must be above 0"):
        dirichlet_chain(4, seed=0, concentration=0.0)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        bigram_backcopy(made, 0, seed=0)
    with pytest.raises(ValueError, match="length must be at least 2"):
        bigram_backcopy(made, 1, seed=0, length=1)
