import pytest
import torch

from foveate import ops
from ops_tools import assert_same


def draw(*shape, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)


def loop(x, weight, bias=None, state=None):
    """The convolution one token and one lag at a time."""
    width = weight.shape[1]
    before = torch.zeros(x.shape[0], width - 1, x.shape[2]) if state is None else state
    seen = torch.cat((before.to(x.dtype), x), 1)
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for i in range(width):
            y[:, t] += weight[:, i] * seen[:, t + i]
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_short_conv_is_its_loop(length, width, dtype):
    x, weight = draw(2, length, 5, dtype=dtype), draw(5, width, seed=1, dtype=dtype)
    bias, state = draw(5, seed=2, dtype=dtype), draw(2, width - 1, 5, seed=3, dtype=dtype)
    for given in ({}, {"bias": bias}, {"bias": bias, "state": state}):
        y, _ = ops.short_conv(x, weight, **given)
        assert_same(y, loop(x, weight, **given), dtype)


def test_short_conv_goes_on_from_its_state():
    x, weight = draw(2, 20, 5), draw(5, 4, seed=1)
    want, last = ops.short_conv(x, weight)
    for cut in (1, 2, 7, 19):
        first, state = ops.short_conv(x[:, :cut], weight)
        rest, after = ops.short_conv(x[:, cut:], weight, state=state)
        assert_same(torch.cat((first, rest), 1), want, torch.float64)
        assert torch.equal(after, last)
    assert torch.equal(last, x[:, -3:])


def test_state_holds_the_last_real_tokens_of_each_row():
    x, weight = draw(3, 8, 2), draw(2, 4, seed=1)
    valid = torch.arange(8) < torch.tensor([8, 5, 1])[:, None]
    y, state = ops.short_conv(x, weight, valid=valid)
    for row, n in enumerate((8, 5, 1)):
        alone, own = ops.short_conv(x[row : row + 1, :n], weight)
        assert_same(y[row : row + 1, :n], alone, torch.float64)
        assert torch.equal(state[row : row + 1], own)


def test_short_conv_is_differentiable():
    x, weight, bias = (
        draw(*s, seed=i).requires_grad_() for i, s in enumerate(((1, 5, 2), (2, 3), (2,)))
    )
    state = draw(1, 2, 2, seed=3).requires_grad_()

    def call(x, weight, bias, state):
        return ops.short_conv(x, weight, bias, state=state)

    assert torch.autograd.gradcheck(call, (x, weight, bias, state))


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("lags", [1, 5, 16])
def test_fft_conv_is_the_sum_over_lags(lags, per_row, circular):
    x = draw(2, 16, 3)
    kernel = draw(*((2,) if per_row else ()), 3, lags, seed=1)
    each = kernel if per_row else kernel.expand(2, -1, -1)
    want = torch.zeros_like(x)
    for t in range(16):
        for lag in range(lags):
            if circular or lag <= t:
                want[:, t] += each[:, :, lag] * x[:, t - lag]
    assert_same(ops.fft_conv(x, kernel, circular=circular), want, torch.float64)
    half = ops.fft_conv(x.bfloat16(), kernel.bfloat16(), circular=circular)
    assert half.dtype == torch.bfloat16


def test_fft_conv_does_not_look_ahead_and_is_differentiable():
    x, kernel = draw(1, 12, 2), draw(2, 12, seed=1)
    late = x.clone()
    late[:, 7:] += 5
    got = ops.fft_conv(late, kernel)[:, :7]
    torch.testing.assert_close(got, ops.fft_conv(x, kernel)[:, :7], atol=1e-12, rtol=0)
    inputs = (x.requires_grad_(), kernel.requires_grad_())
    assert torch.autograd.gradcheck(ops.fft_conv, inputs)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ops.short_conv(draw(2, 5), draw(5, 3)), "x must be"),
        (lambda: ops.short_conv(draw(1, 2, 5), draw(4, 3)), r"weight must be \(5, 3\)"),
        (lambda: ops.short_conv(draw(1, 2, 5), draw(5, 3), state=draw(1, 3, 5)), "state must be"),
        (lambda: ops.fft_conv(draw(1, 4, 2), draw(2, 5)), "5 lags, x only 4 tokens"),
        (lambda: ops.fft_conv(draw(1, 4, 2), draw(3, 4)), r"kernel must be \(2, 4\)"),
        (lambda: ops.fft_conv(draw(4, 2), draw(2, 4)), "x must be"),
    ],
)
def test_refuses_what_does_not_fit(call, said):
    with pytest.raises(ValueError, match=said):
        call()
