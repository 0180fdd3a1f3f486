import pytest
import torch

from foveate.tasks.icl_softmax_reg import icl_softmax_reg


def test_the_gradient_is_that_of_the_loss():
    batch = icl_softmax_reg(6, seed=0, dtype=torch.float64)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6
    for i in range(5):
        nudge = torch.zeros_like(x)
        nudge[:, i] = step
        slope = (batch.loss(x + nudge) - batch.loss(x - nudge)) / (2 * step)
        torch.testing.assert_close(slope, batch.gradient(x)[:, i], atol=1e-9, rtol=1e-6)


def test_loss_and_gradient_are_zero_at_the_solution():
    batch = icl_softmax_reg(6, seed=0, dtype=torch.float64)
    assert batch.loss(batch.x).max() < 1e-30 and batch.gradient(batch.x).abs().max() < 1e-15
    assert batch.loss(torch.zeros_like(batch.x)).min() > 1e-5


def test_b_is_a_distribution_and_the_query_is_not_told_by_its_sum():
    batch = icl_softmax_reg(200, seed=1)
    assert batch.a.shape == (200, 20, 5) and batch.query.shape == batch.x.shape == (200, 5)
    torch.testing.assert_close(batch.b.sum(1), torch.ones(200))
    assert (batch.target > 0).all() and batch.target.std() > 0.01
    assert abs(float(batch.x.var()) - 1 / 5) < 0.03


def test_the_solution_predicts_the_query_and_the_logarithm_is_linear():
    batch = icl_softmax_reg(30, seed=2, dtype=torch.float64)
    torch.testing.assert_close(batch.predict(batch.x), batch.target)
    ones = torch.ones(30, 20, 1, dtype=torch.float64)
    fitted = torch.linalg.lstsq(torch.cat((batch.a, ones), -1), batch.b.log()[..., None]).solution
    torch.testing.assert_close(fitted[:, :5, 0], batch.x)
    at_query = (fitted[:, :5, 0] * batch.query).sum(-1) + fitted[:, 5, 0]
    torch.testing.assert_close(at_query.exp(), batch.target)


@pytest.mark.parametrize("length", [20, 60])
def test_more_gradient_steps_come_closer(length):
    batch = icl_softmax_reg(100, seed=3, length=length)
    reached = [batch.descend(steps) for steps in (0, 4, 16, 64, 256)]
    assert (reached[0] == 0).all()
    for far in (
        [float(batch.loss(x).mean()) for x in reached],
        [float((batch.predict(x) - batch.target).abs().mean()) for x in reached],
    ):
        assert far == sorted(far, reverse=True) and far[-1] < 0.1 * far[0]


def test_seeds_reproduce_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two, other = (icl_softmax_reg(4, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.a, other.a)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_refuses_bad_input():
    for name, least in (("rows", 1), ("length", 2), ("dim", 1)):
        with pytest.raises(ValueError, match=f"{name} must be at least {least}"):
            icl_softmax_reg(**{"rows": 2, "seed": 0} | {name: least - 1})
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        icl_softmax_reg(2, seed=0).descend(-1)
