import pytest
import torch

import foveate
from foveate import ops
from layer_checks import heads_of, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("linattn", **{"dim": 32, "heads": 4} | options).double()


def plain(layer, x, source, causal, features, normalize=True):
    """Attention with an explicit matrix of weights φ(q)·φ(k)."""
    q, k = (features(heads_of(part, y, 8)) for part, y in ((layer.q, x), (layer.k, source)))
    weights = q @ k.mT
    if causal:
        weights = weights.tril(source.shape[1] - x.shape[1])
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return layer.out((weights @ heads_of(layer.v, source, 8)).transpose(1, 2).flatten(2))


def elu1(x):
    return torch.where(x > 0, x + 1, x.exp())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_equals_the_normalised_matrix(causal, cross):
    layer, x = build(), tokens(13).double()
    context = tokens(21, seed=2).double() if cross else None
    with torch.no_grad():
        got = layer(x, context=context, causal=causal)
        want = plain(layer, x, x if context is None else context, causal, elu1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_without_a_denominator_the_scale_remains():
    layer, x = build(features="identity", normalize=False), tokens(13).double()
    with torch.no_grad():
        want = plain(layer, x, x, True, lambda y: y * 8**-0.25, normalize=False)
        torch.testing.assert_close(layer(x), want, atol=1e-10, rtol=1e-8)


def test_the_second_taylor_polynomial_carries_its_scale():
    layer, x = build(features="taylor2"), tokens(13).double()
    with torch.no_grad():
        q, k = (heads_of(part, x, 8) for part in (layer.q, layer.k))
        scores = q @ k.mT / 8**0.5
        weights = (1 + scores + scores**2 / 2).tril()
        mean = weights / weights.sum(-1, keepdim=True) @ heads_of(layer.v, x, 8)
        want = layer.out(mean.transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


def test_the_order_of_the_keys_matters_only_where_it_is_causal():
    layer, x, context = build(), tokens(5).double(), tokens(21, seed=2).double()
    other = context[:, torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        both = [layer(x, context=y, causal=False) for y in (context, other)]
        torch.testing.assert_close(*both)
        ordered = [layer(x, context=y, causal=True) for y in (context, other)]
    assert not torch.allclose(*ordered)


def test_equal_values_come_out_as_they_are_because_weights_sum_to_one():
    layer, x = build(), tokens(40).double()
    q, k, _ = layer._terms(x, x)
    ones = torch.ones(2, 4, 40, 3, dtype=torch.float64)
    out, _ = ops.linear_attention_causal(q, k, ones, eps=1e-12)
    torch.testing.assert_close(out, ones)


def test_the_state_does_not_grow():
    layer, x = build(), tokens(40).double()
    with torch.no_grad():
        _, short = layer(x[:, :3], return_state=True)
        _, long = layer(x, return_state=True)
    assert short.s.shape == long.s.shape == (2, 4, 8, 8) and long.z.shape == (2, 4, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"features": "identity"}, "may be negative.*give normalize=False"),
        ({"features": "cosine"}, "unknown feature map 'cosine'; known: identity"),
        ({"heads": 5}, "multiple of heads, got 5 heads"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_refuses_more_queries_than_keys_where_it_is_causal():
    with pytest.raises(ValueError, match="x must not be longer than its context"):
        build()(tokens(9).double(), context=tokens(5).double())
