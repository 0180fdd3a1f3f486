import math

import pytest
import torch

from foveate import ops
from ops_tools import assert_same, qkv


def plain(fq, fk, v, *, causal=True, normalize=True, eps=1e-6, weight=None):
    """The weights as a matrix, in float64."""
    group = fq.shape[1] // fk.shape[1]
    fk, v = (x.double().repeat_interleave(group, 1) for x in (fk, v))
    weights = fq.double() @ fk.mT
    if causal:
        weights = weights.tril()
    if weight is not None:
        weights = weights * weight.double().repeat_interleave(group, 1)[:, :, None]
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return weights @ v


def features(length=50, **options):
    q, k, v = qkv(length, length, **options)
    return q.exp(), k.exp(), v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("length", [1, 17, 130])
def test_causal_form_is_the_matrix(length, normalize, dtype):
    fq, fk, v = features(length, dtype=dtype)
    fq, fk = fq / 8, fk / 8
    out, (s, z) = ops.linear_attention_causal(fq, fk, v, normalize=normalize)
    assert out.dtype == dtype and s.dtype == z.dtype == torch.promote_types(dtype, torch.float32)
    want = plain(fq, fk, v, normalize=normalize)
    assert_same(out, want.to(dtype), dtype)
    assert_same(z.double(), fk.double().sum(2), dtype)
    assert_same(s.double(), fk.double().mT @ v.double(), dtype)


def test_goes_on_from_its_state_and_ends_where_the_global_form_is():
    fq, fk, v = features(60)
    want, last = ops.linear_attention_causal(fq, fk, v)
    for cut in (1, 31, 59):
        first, state = ops.linear_attention_causal(fq[:, :, :cut], fk[:, :, :cut], v[:, :, :cut])
        parts = (x[:, :, cut:] for x in (fq, fk, v))
        rest, after = ops.linear_attention_causal(*parts, state=state)
        assert_same(torch.cat((first, rest), 2), want)
        assert_same(after[0] / 60, last[0] / 60)
    whole = ops.linear_attention_global(fq[:, :, -1:], fk, v)
    assert_same(want[:, :, -1:], whole)


def test_padding_writes_nothing():
    fq, fk, v = features(20)
    valid = torch.arange(20) < torch.tensor([20, 13])[:, None]
    out, (s, z) = ops.linear_attention_causal(fq, fk, v, valid=valid)
    alone, (own_s, own_z) = ops.linear_attention_causal(*(x[1:, :, :13] for x in (fq, fk, v)))
    assert_same(out[1:, :, :13], alone)
    assert_same((s[1:], z[1:]), (own_s, own_z))
    assert (out[1, :, 13:] == 0).all()


def test_causal_form_is_differentiable():
    inputs = [x.requires_grad_() for x in features(7, batch=1, dim=3, v_dim=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *x: ops.linear_attention_causal(*x)[0], inputs, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("taylor1", lambda s: 1 + s),
        ("taylor2", lambda s: 1 + s + s * s / 2),
        ("identity", lambda s: s * 4),
    ],
)
def test_products_of_features_are_the_polynomial(name, want):
    q, k = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double()
    phi = ops.feature_map(name)
    torch.testing.assert_close(phi(q) @ phi(k).T, want(q @ k.T / math.sqrt(16)))


@pytest.mark.parametrize("name", ["elu1", "relu", "silu", "sigmoid", "exp", "softmax", "taylor2"])
def test_maps_say_how_wide_and_how_positive_they_are(name):
    phi = ops.feature_map(name)
    x = 3 * torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    assert phi(x).shape == (400, phi.width(6))
    least = float((phi(x) @ phi(x).T).min())
    assert least >= 0 if phi.positive else least < 0


def test_an_unknown_map_is_refused():
    with pytest.raises(ValueError, match="unknown feature map 'cosine'; known: identity"):
        ops.feature_map("cosine")
