import pytest
import torch

import foveate
from layer_checks import plain_attention, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("fastmax", **{"dim": 32, "heads": 4} | options)


def standardised(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def scores(layer, x, context, temperature=1.0):
    q, k, v = (
        part(y).unflatten(-1, (4, -1)).transpose(1, 2)
        for part, y in ((layer.q, x), (layer.k, context), (layer.v, context))
    )
    q, k = standardised(q), standardised(k)
    return q @ k.mT / (temperature * q.shape[3] ** 0.5), v


def weights(layer, x, context, causal, degree, temperature=1.0):
    s, v = scores(layer, x, context, temperature)
    w = 1 + s + (s * s / 2 if degree == 2 else 0)
    if causal:
        w = w.tril(w.shape[3] - w.shape[2])
    return w / (w.sum(-1, keepdim=True) + 1e-6), v


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("degree", "temperature"), [(2, 1.0), (2, 0.3), (1, 2.83)])
def test_factors_give_the_polynomial_of_the_definition(degree, temperature, causal, cross):
    layer = build(degree=degree, temperature=temperature).double()
    x = tokens(13).double()
    context = tokens(21, seed=2).double() if cross else x
    with torch.no_grad():
        w, v = weights(layer, x, context, causal, degree, temperature)
        want = layer.out((w @ v).transpose(1, 2).flatten(2))
        got = layer(x, context=context if cross else None, causal=causal)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


def test_weights_are_a_half_at_least_at_degree_2_and_not_negative_at_degree_1():
    for degree, temperature, least in ((2, 0.2, 0.5), (1, 8**0.5, 0.0)):
        layer = build(degree=degree, temperature=temperature).double()
        made = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, 4, 400, 8, generator=made, dtype=torch.float64)
        with torch.no_grad():
            fq, fk = layer.features(q, k)
            w = fq @ fk.mT
        assert w.min() >= least - 1e-12 and w.min() < least + 0.1


def test_the_higher_the_degree_and_the_temperature_the_nearer_to_softmax():
    x, off = tokens(40).double(), {}
    for temperature in (3.0, 6.0):
        for degree in (1, 2):
            layer = build(degree=degree, temperature=temperature).double()
            with torch.no_grad():
                w, _ = weights(layer, x, x, True, degree, temperature)
                s, _ = scores(layer, x, x, temperature)
                soft = s.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)
                off[degree, temperature] = float((w - soft).abs().sum(-1).mean())
    assert off[2, 3.0] < off[1, 3.0] / 2 and off[2, 6.0] < off[1, 6.0] / 2
    assert off[2, 6.0] < off[2, 3.0] / 4 and off[2, 6.0] < 0.01


def test_at_a_high_temperature_it_is_softmax_attention():
    layer, x = build(temperature=8.0).double(), tokens(30).double()
    with torch.no_grad():
        q, k, v = (
            part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (layer.q, layer.k, layer.v)
        )
        soft = plain_attention(standardised(q) / 8, standardised(k), v, True)
        want = layer.out(soft.transpose(1, 2).flatten(2))
        far = float((layer(x) - want).norm() / want.norm())
    assert far < 0.01


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"degree": 3}, "degree must be 1 or 2, got 3"),
        ({"degree": 1}, r"at least sqrt\(K\) = 2.828 for weights >= 0, got 1.0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"heads": 5}, "multiple of heads"),
        ({"qk_width": 0}, "qk_width must be at least 1"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
