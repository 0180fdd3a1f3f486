import pytest
import torch

import foveate
from foveate import ops
from layer_checks import heads_of, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("gla", **{"dim": 32, "heads": 4} | options)


def loop(q, k, v, keep):
    """o_t = S_tᵀ q_t / sqrt(K), S_t = diag(a_t) S_{t-1} + k_t v_tᵀ, in float64."""
    q, k, v, keep = (y.double() for y in (q, k, v, keep))
    state, outs = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3]).double(), []
    for t in range(q.shape[2]):
        state = keep[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((state * q[:, :, t, :, None]).sum(2) / k.shape[3] ** 0.5)
    return torch.stack(outs, 2)


def test_equals_the_definition_token_by_token():
    layer, x = build(normalizer=2.0), tokens(70)
    with torch.no_grad():
        narrow, wide = layer.gate
        keep = torch.sigmoid(x @ narrow.weight.T @ wide.weight.T + wide.bias) ** 0.5
        q, k = (heads_of(part, x, 4) for part in (layer.q, layer.k))
        keep = keep.unflatten(-1, (4, 4)).transpose(1, 2)
        heads = loop(q, k, heads_of(layer.v, x, 8), keep).transpose(1, 2)
        heads = heads / (heads.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        gate = layer.readout.gate(x)
        want = layer.readout.out((heads.flatten(2) * gate * gate.sigmoid()).float())
        torch.testing.assert_close(layer(x), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("strength", [1.0, 200.0])
def test_chunks_equal_the_loop_for_weak_and_strong_gates(strength):
    made = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 130, 8, generator=made)
    decay = -strength * torch.rand(1, 2, 130, 8, generator=made)
    got, _ = ops.scan(q, k, v, decay=decay, side="key")
    want = loop(q, k, v, decay.double().exp())
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_an_open_gate_leaves_linear_attention_without_a_denominator():
    layer, x = build(), tokens(40)
    with torch.no_grad():
        layer.gate[1].bias.fill_(60.0)
        seen = {}
        layer.readout.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
        layer(x)
        q, k = (heads_of(part, x, 4) for part in (layer.q, layer.k))
        want = (q @ k.mT / 2).tril() @ heads_of(layer.v, x, 8)
    torch.testing.assert_close(seen["heads"], want, atol=1e-5, rtol=1e-4)


def test_one_gate_for_all_channels_is_a_decay_per_token():
    made = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 90, 8, generator=made)
    decay = -torch.rand(1, 2, 90, generator=made)
    got = ops.scan(q, k, v, decay=decay[..., None].expand(-1, -1, -1, 8), side="key")
    for one, other in zip(got, ops.scan(q, k, v, decay=decay), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 5}, "multiple of heads, got 5 heads"),
        ({"normalizer": 0.0}, "normalizer must be above 0, got 0"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
