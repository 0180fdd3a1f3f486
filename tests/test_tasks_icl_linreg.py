import pytest
import torch

from foveate.tasks.icl_linreg import best_rate, icl_linreg

SIZES = {"length": 20, "dim": 8, "noise": 0.5}


def losses(batch, **sizes):
    rates = {d: best_rate(**sizes, debiased=d) for d in (False, True)}
    return {
        "zero": float(batch.loss(torch.zeros_like(batch.target))),
        "ridge": float(batch.loss(batch.ridge(sizes["noise"]))),
        "step": float(batch.loss(batch.gradient_step(rates[False]))),
        "debiased": float(batch.loss(batch.gradient_step(rates[True], debiased=True))),
    }


@pytest.mark.parametrize("noisy", [True, False])
def test_predictors_lose_what_is_known(noisy):
    got = losses(icl_linreg(40_000, seed=0, noisy_target=noisy, **SIZES), **SIZES)
    known = {"zero": 1.25, "ridge": 0.39, "step": 0.60, "debiased": 0.62}
    for name, want in known.items():
        assert abs(got[name] - (want if noisy else want - 0.25)) < 0.02, name


@pytest.mark.parametrize("components", [1, 2])
def test_ridge_is_the_best_of_its_kind(components):
    batch = icl_linreg(8000, seed=1, components=components, **SIZES)
    best = float(batch.loss(batch.ridge(0.5)))
    assert all(best < float(batch.loss(batch.ridge(noise))) for noise in (0.25, 0.4, 0.62, 1.0))
    assert best < 0.75 * min(v for k, v in losses(batch, **SIZES).items() if k != "ridge")


@pytest.mark.parametrize("debiased", [False, True])
def test_the_best_rate_is_the_best(debiased):
    batch = icl_linreg(40_000, seed=2, **SIZES)
    best = best_rate(**SIZES, debiased=debiased)
    step = batch.gradient_step(1.0, debiased=debiased)
    fitted = float((step * batch.target).sum() / step.square().sum())
    assert abs(best - fitted) < 0.015


def test_ridge_solves_every_component_on_its_block():
    batch = icl_linreg(3, seed=0, components=2, length=9, dim=6, noise=0.3)
    predicted = batch.ridge(0.3)
    for row in range(3):
        for c in range(2):
            block = slice(3 * c, 3 * c + 3)
            x, y = batch.x[row, :, block].double(), batch.y[row, :, c].double()
            weight = torch.linalg.inv(x.T @ x + 3 * 0.09 * torch.eye(3)) @ x.T @ y
            want = float(weight @ batch.query[row, block].double())
            assert abs(float(predicted[row, c]) - want) < 1e-5


def test_debiased_steps_do_not_see_a_shift_of_y():
    batch = icl_linreg(50, seed=3, **SIZES)
    shifted = batch._replace(y=batch.y + 7)
    same = [b.gradient_step(0.6, debiased=True) for b in (batch, shifted)]
    torch.testing.assert_close(*same, atol=1e-5, rtol=1e-5)
    plain = [b.gradient_step(0.6) for b in (batch, shifted)]
    assert (plain[0] - plain[1]).abs().mean() > 0.5


def test_longer_rows_than_those_of_training_are_easier():
    ridge = [
        float(batch.loss(batch.ridge(0.5)))
        for batch in (icl_linreg(4000, seed=4, length=n, dim=8) for n in (10, 20, 40, 80))
    ]
    assert ridge == sorted(ridge, reverse=True) and ridge[-1] < 0.3 * ridge[0]
    rate = best_rate(20, 8, 0.5)
    long = icl_linreg(4000, seed=5, length=80)
    short = icl_linreg(4000, seed=5, length=20)
    steps = [float(batch.loss(batch.gradient_step(rate))) for batch in (long, short)]
    assert steps[0] < steps[1]


@pytest.mark.parametrize("correlation", [0.0, 0.7, -0.5])
def test_x_has_its_covariance_and_y_variance_one(correlation):
    batch = icl_linreg(20_000, seed=6, dim=4, length=20, noise=0, correlation=correlation)
    x = batch.x.flatten(0, 1)
    want = torch.tensor([[correlation ** abs(i - j) for j in range(4)] for i in range(4)])
    torch.testing.assert_close(x.T @ x / len(x), want.float(), atol=0.02, rtol=0)
    assert abs(float(batch.target.var()) - 1) < 0.04
    torch.testing.assert_close(batch.ridge(1e-3), batch.target, atol=0.01, rtol=0)


def test_seeds_reproduce_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two, other = (icl_linreg(4, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.x, other.x)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"components": 3}, "multiple of 3 components, got 8"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"correlation": 1.0}, "correlation must be between -1 and 1, got 1.0"),
    ],
)
def test_refuses_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        icl_linreg(**{"rows": 2, "seed": 0} | options)
