import pytest
import torch

import foveate
from foveate.nn import Transformer
from foveate.nn._recurrent import state_bytes
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("based", **{"dim": 32, "heads": 4, "qk_width": 6} | options)


def full_map(x):
    """[1, x / d^1/4, x ⊗ x / sqrt(2 d)]: all d² products."""
    width = x.shape[-1]
    outer = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat((torch.ones_like(x[..., :1]), x / width**0.25, outer / (2 * width) ** 0.5), -1)


def test_the_map_has_the_products_of_the_full_one_in_nearly_half_the_channels():
    layer = build(qk_width=16)
    made = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 4, 30, 16, generator=made, dtype=torch.float64)
    fq, fk = layer.features(q, k)
    s = q @ k.mT / 4
    assert fq.shape[-1] == 153 and full_map(q).shape[-1] == 273
    torch.testing.assert_close(fq @ fk.mT, 1 + s + s * s / 2)
    torch.testing.assert_close(fq @ fk.mT, full_map(q) @ full_map(k).mT)
    assert (fq @ fk.mT).min() >= 0.5


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_polynomial_of_the_definition(causal, cross):
    layer, x = build().double(), tokens(70).double()
    context = tokens(81, seed=2).double() if cross else x
    with torch.no_grad():
        q, k, v = (
            part(y).unflatten(-1, (4, -1)).transpose(1, 2)
            for part, y in ((layer.q, x), (layer.k, context), (layer.v, context))
        )
        s = q @ k.mT / 6**0.5
        w = 1 + s + s * s / 2
        w = w.tril(w.shape[3] - w.shape[2]) if causal else w
        want = layer.out((w @ v / w.sum(-1, keepdim=True)).transpose(1, 2).flatten(2))
        got = layer(x, context=context if cross else None, causal=causal)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("width", [4, 16])
def test_the_state_is_of_the_features_and_one_normaliser_whatever_the_length(width):
    layer = build(qk_width=width)
    features = 1 + width + width * (width + 1) // 2
    for length in (3, 90):
        with torch.no_grad():
            _, state = layer(tokens(length, batch=1), return_state=True)
        assert state_bytes(state) == 4 * 4 * features * (8 + 1)


def test_beside_a_short_window_it_makes_the_model_of_the_paper():
    torch.manual_seed(0)
    pattern = "based:qk_width=4, softmax_attention:window=5"
    model = Transformer(40, 32, pattern, layers=4, heads=4)
    ids = torch.randint(0, 40, (1, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, state = model(ids), None
        outs = []
        for token in ids.split(1, 1):
            logits, state = model(token, state=state, return_state=True)
            outs.append(logits)
    torch.testing.assert_close(torch.cat(outs, 1), want, atol=1e-5, rtol=1e-4)
    assert [layer.keys.shape[2] for layer in state.layers[1::2]] == [4, 4]


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of heads, got 5"):
        build(heads=5)
    with pytest.raises(ValueError, match="qk_width must be at least 1, got 0"):
        build(qk_width=0)
