import pytest
import torch

from foveate.analysis.icl_regression import IclRegression, predict, reduced
from foveate.tasks.icl_linreg import icl_linreg


def data(**options):
    found = icl_linreg(300, seed=0, length=40, dim=5, noise=0.1, **options)
    return type(found)(*(x.double() for x in found))


def heads(omega, mu):
    return reduced(torch.tensor(omega).double(), torch.tensor(mu).double(), 5)


def said(omega, mu, rows):
    return predict(*heads(omega, mu), rows.x, rows.y, rows.query)


def error(omega):
    """Relative distance of two opposite heads from the debiased gradient step."""
    rows = data()
    step = rows.gradient_step(2 * 1.5 * omega, debiased=True)
    return float((said((omega, -omega), (1.5, -1.5), rows) - step).norm() / step.norm())


def test_two_opposite_heads_are_a_debiased_gradient_step():
    assert error(0.1) < 0.03
    assert error(0.1) / error(0.05) == pytest.approx(4, rel=0.2)


def test_one_head_keeps_the_mean_of_y():
    rows, omega = data(), 1e-3
    want = 2.0 * (rows.y.mean(1) + rows.gradient_step(omega, debiased=True))
    torch.testing.assert_close(said((omega,), (2.0,), rows), want, rtol=1e-2, atol=1e-4)


def test_heads_in_balance_do_not_hear_a_shift_of_y():
    rows = data()
    moved = rows._replace(y=rows.y + 3)
    for mu in ((2.0, -2.0), (1.0, 2.0, -3.0)):
        omega = (0.2, -0.3, 0.1)[: len(mu)]
        torch.testing.assert_close(said(omega, mu, rows), said(omega, mu, moved))
    change = said((0.2,), (2.0,), moved) - said((0.2,), (2.0,), rows)
    torch.testing.assert_close(change, torch.full_like(change, 6.0))


def test_prediction_is_softmax_attention_over_the_examples():
    rows, made = data(), torch.Generator().manual_seed(1)
    kq, ov = (torch.randn(2, 6, 6, generator=made, dtype=torch.float64) for _ in range(2))
    tokens = torch.cat((rows.x, rows.y), -1)[7]
    query = torch.cat((rows.query[7], torch.zeros(1)))
    outs = [ov[h] @ (tokens.T @ (tokens @ kq[h] @ query).softmax(0)) for h in range(2)]
    got = predict(kq, ov, rows.x, rows.y, rows.query)[7, 0]
    torch.testing.assert_close(got, sum(outs)[-1])


def test_structure_of_ideal_heads_is_seen():
    record = IclRegression()(*heads((0.2, -0.2), (2.0, -2.0)))
    torch.testing.assert_close(record["omega"], torch.tensor([0.2, -0.2]).double())
    torch.testing.assert_close(record["mu"], torch.tensor([2.0, -2.0]).double())
    for name in ("off", "off_value", "spread", "balance"):
        assert float(record[name].abs().max()) == pytest.approx(0, abs=1e-12)
    assert float(record["agree"]) == 1


def test_departures_from_ideal_heads_are_measured():
    kq, ov = heads((0.2, 0.4), (1.0, -1.5))
    kq[0, 0, 1], ov[1, -1, 0] = 1.0, 0.5
    kq[:, :, -1] = 7.0  # multiplies the y of the query, which is 0
    record = IclRegression()(kq, ov)
    torch.testing.assert_close(record["off"], torch.tensor([0.5, 0.0]).double())
    torch.testing.assert_close(record["off_value"], torch.tensor([0.0, 0.25]).double())
    assert float(record["spread"]) == pytest.approx(1 / 3)
    assert float(record["balance"]) == pytest.approx(0.2)
    assert float(record["agree"]) == 0.5


def test_bad_input_is_named():
    kq, ov = heads((0.2,), (1.0,))
    with pytest.raises(ValueError, match=r"must be \(heads, 6, 6\), got \(1, 6, 6\) and \(1, 5"):
        IclRegression()(kq, ov[:, 1:, 1:])
    rows = icl_linreg(2, seed=0, dim=4)
    with pytest.raises(ValueError, match=r"must be \(heads, 5, 5\)"):
        predict(kq, ov, rows.x, rows.y, rows.query)
