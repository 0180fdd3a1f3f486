import pytest
import torch

import foveate
from foveate import ops
from foveate.nn.linear.orchid import Orchid
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("orchid", **{"dim": 32} | options)


def near(x, weight, bias, before, circular):
    """A convolution of 3 tokens of each channel of x (L, C), `before` of them in the past."""
    length, out = len(x), torch.zeros_like(x)
    for t in range(length):
        for i in range(3):
            at = t + i - before
            if circular or 0 <= at < length:
                out[t] += weight[:, 0, i] * x[at % length]
    return out + bias


def long(x, kernel, circular):
    """y_t = Σ_j kernel_j x_{t-j} of x (L, C), kernel (C, L)."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for j in range(len(x) if circular else t + 1):
            out[t] += kernel[:, j] * x[t - j]
    return out


def adapted(part, x):
    """The kernels (C, L) that a row x (L, C) makes, by the plain Fourier sums."""
    length = len(x)
    size = length if part.circular else 2 * length
    angle = 2 * torch.pi / size * torch.arange(size // 2 + 1)[:, None] * torch.arange(length)
    turns = torch.exp(-1j * angle.double())
    spectra = [
        turns @ part.norm(near(x, conv.weight, conv.bias, 1, part.circular)).to(turns.dtype)
        for conv in part.local
    ]
    if part.kind == "power":
        shown = (spectra[0].abs() ** 2)[..., None]
    else:
        shown = torch.view_as_real(spectra[1].conj() * spectra[0])
    shown = (shown / size).float()
    mixed = torch.zeros(len(shown), 64)
    for f in range(len(shown)):
        for i in range(3):
            if 0 <= f + i - 1 < len(shown):
                taps = part.mix.weight[:, :, i].view(32, 2, -1)
                mixed[f] += torch.einsum("con,cn->co", taps, shown[f + i - 1]).flatten()
    mixed = part.even(mixed + part.mix.bias)
    spectrum = torch.complex(mixed[:, 0::2], mixed[:, 1::2])
    return torch.fft.irfft(spectrum, n=size, dim=0)[:length].T


@pytest.mark.parametrize("kind", ["power", "correlation", "none"])
@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("length", [8, 11])
def test_is_its_definition(kind, circular, length):
    layer, rows = build(kind=kind, circular=circular), tokens(length)
    with torch.no_grad():
        for x, got in zip(rows, layer(rows, causal=False), strict=True):
            parts = x @ layer.inner.weight.T + layer.inner.bias
            kernel = layer.fixed(length)
            if kind != "none":
                kernel = kernel + adapted(layer.adaptive, parts[:, 64:])
            mixed = near(parts, layer.near.weight, layer.near.bias, 2, circular)
            gate, other, v = mixed.split(32, -1)
            z = other * v
            y = (long(z, kernel, circular) + layer.skips[0] * z) * gate
            y = y + long(x, layer.beside(length), circular) + layer.skips[1] * x
            want = y @ layer.out.weight.T + layer.out.bias
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["power", "correlation"])
def test_turning_the_sequence_turns_the_result(kind):
    layer, x = build(kind=kind), tokens(13)
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x.roll(4, 1), causal=False),
            layer(x, causal=False).roll(4, 1),
            atol=1e-5,
            rtol=1e-4,
        )
        kernels = [layer.kernel(y) for y in (x, x.roll(4, 1))]
        torch.testing.assert_close(*kernels, atol=1e-5, rtol=1e-4)


def test_other_tokens_make_other_kernels_at_every_lag():
    layer, x = build(), tokens(13)
    other = x.clone()
    other[:, -1] *= -3
    with torch.no_grad():
        moved = (layer.kernel(other) - layer.kernel(x)).abs().amax(1)
        assert (moved > 1e-4).all()
        fixed = build(kind="none")
        assert torch.equal(fixed.kernel(x), fixed.kernel(other))


def test_the_last_token_changes_the_first_so_it_is_never_causal():
    layer, x = build(circular=False), tokens(13)
    other = x.clone()
    other[:, -1] += 1
    with torch.no_grad():
        moved = (layer(other, causal=False) - layer(x, causal=False))[:, 0]
    assert moved.abs().max() > 1e-4
    with pytest.raises(ValueError, match="never causal: its kernels depend on the whole sequence"):
        layer(x, causal=True)


def test_fixed_kernels_decay_at_rates_of_their_channels():
    kernel = build().fixed
    torch.testing.assert_close(kernel.decay[0], torch.tensor(4.60517 / 1.5))
    torch.testing.assert_close(kernel.decay[-1], torch.tensor(4.60517 / 0.3))
    with torch.no_grad():
        assert kernel(200)[-1, -1].abs() < 1e-5 < kernel(200)[0, -1].abs()


def test_rows_are_mixed_at_their_own_lengths():
    layer, x = build(), tokens(13)
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[0, [1, 5, 12]], valid[1] = False, False
    with torch.no_grad():
        got = layer(x, causal=False, mask=ops.padding(valid))
        want = layer(x[:1, valid[0]], causal=False)[0]
    torch.testing.assert_close(got[0, valid[0]], want, atol=1e-6, rtol=1e-5)
    assert (got[1] == 0).all() and (got[0, ~valid[0]] == 0).all()


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="kind must be one of power, correlation, none, got 'sum'"):
        Orchid(32, kind="sum")
    with pytest.raises(ValueError, match="width must be at least 1"):
        build(width=0)
