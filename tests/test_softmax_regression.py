import pytest
import torch

from foveate.analysis.softmax_regression import (
    SoftmaxRegression,
    change_of_a,
    change_of_x,
    equal_shift,
)
from foveate.tasks.icl_softmax_reg import icl_softmax_reg

DATA = icl_softmax_reg(50, seed=0, dtype=torch.float64)


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradient_is_the_finite_difference():
    x, way, h = drawn(50, 5), drawn(50, 5, seed=2), 1e-6
    want = (DATA.loss(x + h * way) - DATA.loss(x - h * way)) / (2 * h)
    torch.testing.assert_close((DATA.gradient(x) * way).sum(-1), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_no_change_exceeds_its_bound(size):
    x = drawn(50, 5)
    for change in (
        change_of_x(DATA.a, x, size * drawn(50, 5, seed=2)),
        change_of_a(DATA.a, x, size * drawn(50, 20, 5, seed=3)),
    ):
        assert bool((change.moved <= change.bound).all()) and float(change.moved.min()) > 0


def test_bound_is_reached_between_two_keys_alike():
    a = torch.tensor([[[1.0], [-1.0]]]).double()
    zero, step = torch.zeros(1, 1).double(), torch.full((1, 1), 1e-4).double()
    change = change_of_x(a, zero, step)
    torch.testing.assert_close(change.moved, change.bound)


def test_a_step_and_its_equal_shift_have_one_output():
    x, step = drawn(50, 5), drawn(50, 5, seed=2)
    shift = equal_shift(DATA.a, x, step)
    by_step = torch.einsum("nld,nd->nl", DATA.a, x + step)
    by_shift = torch.einsum("nld,nd->nl", DATA.a + shift, x)
    torch.testing.assert_close(by_step, by_shift)


def test_record_of_a_gradient_step():
    x = drawn(50, 5)
    record = SoftmaxRegression(rate=0.5)(DATA, x)
    torch.testing.assert_close(record["step"], (10 * DATA.gradient(x)).norm(dim=1))
    torch.testing.assert_close(record["moved"], record["moved_by_shift"])
    assert bool((record["moved"] <= record["shift_bound"]).all())
    assert bool((record["shift_bound"] <= record["step_bound"] + 1e-12).all())
    at_target = SoftmaxRegression()(DATA, DATA.x)
    assert float(at_target["moved"].max()) < 1e-12


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="rate must be above 0, got 0"):
        SoftmaxRegression(rate=0.0)
    with pytest.raises(ValueError, match=r"x must be \(50, 5\), got \(5,\)"):
        SoftmaxRegression()(DATA, DATA.x[0])
