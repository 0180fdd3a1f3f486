import pytest
import torch
from torch import nn

import foveate
from foveate import ops
from foveate.nn.linear.dsf import System, dsf_matrices
from layer_checks import tokens


def build(name="dsf", seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create(name, **{"dim": 32, "heads": 4} | options)


def heads(layer, x):
    """q, k and v of a `dsf` layer in float64."""
    return (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in layer.qkv(x).double().chunk(3, -1))


def test_equals_the_definition():
    layer, x = build(), tokens(40)
    with torch.no_grad():
        q, k, v = heads(layer, x)
        norm = layer.normalizer(x).double().exp().mT[..., None]
        out = (q @ k.mT).tril() @ v / norm
        want = layer.out(out.transpose(1, 2).flatten(2).float())
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_without_weights_of_the_normaliser_it_is_plain_linear_attention():
    layer, x = build(), tokens(40)
    with torch.no_grad():
        layer.normalizer.weight.zero_()
        layer.normalizer.bias.zero_()
        q, k, v = heads(layer, x)
        out, _ = ops.linear_attention_causal(q, k, v, normalize=False)
        want = layer.out(out.transpose(1, 2).flatten(2).float())
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_a_normaliser_out_of_bounds_gives_numbers():
    layer, x = build(), tokens(20)
    with torch.no_grad():
        layer.normalizer.bias.copy_(torch.tensor([1e4, -1e4, 0.0, 1.0]))
        assert torch.isfinite(layer(x)).all()


def values(layer, x):
    if hasattr(layer, "split"):
        more = [torch.arange(30).expand(2, 30)] if hasattr(layer, "slopes") else []
        return layer.split(x, *more)[2]
    return layer.v(x).unflatten(-1, (4, 8)).transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dsf", {}),
        ("linattn", {}),
        ("linattn", {"features": "identity", "normalize": False}),
        ("linattn", {"features": "taylor2"}),
        ("lightning2", {}),
        ("tnl", {"layers": 2}),
        ("minimax_m1", {"index": 1, "layers": 3}),
    ],
)
def test_the_matrices_of_a_layer_give_what_it_gives_before_its_way_out(name, options):
    layer, x = build(name, **options), tokens(30)
    seen = {}
    way_out = layer.readout if hasattr(layer, "readout") else layer.out
    way_out.register_forward_pre_hook(lambda _, args: seen.update(given=args[0]))
    with torch.no_grad():
        layer(x)
        got = dsf_matrices(layer, x).matrix() @ values(layer, x)
    want = seen["given"]
    if want.dim() == 3:
        want = want.unflatten(-1, (4, 8)).transpose(1, 2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_the_matrix_is_the_recurrence_written_out():
    made = torch.Generator().manual_seed(0)
    keep = torch.rand(1, 2, 12, generator=made).double()
    write, read, v = torch.randn(3, 1, 2, 12, 5, generator=made).double()
    h, outs = torch.zeros(1, 2, 5, 5).double(), []
    for t in range(12):
        h = keep[:, :, t, None, None] * h + write[:, :, t, :, None] * v[:, :, t, None]
        outs.append((h * read[:, :, t, :, None]).sum(2))
    got = System(keep, write, read).matrix() @ v
    torch.testing.assert_close(got, torch.stack(outs, 2))


def test_a_normalised_layer_is_a_system_whose_weights_sum_to_one():
    weights = dsf_matrices(build("linattn"), tokens(30)).matrix()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 30), atol=1e-4, rtol=1e-4)


def test_a_state_space_without_decay_is_linear_attention():
    made = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 30, 8, generator=made).double()
    space = System(torch.ones(1, 2, 30).double(), k, q).matrix() @ v
    want, _ = ops.linear_attention_causal(q, k, v, normalize=False)
    torch.testing.assert_close(space, want)


def test_longer_taylor_polynomials_come_nearer_to_softmax():
    made = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 30, 8, generator=made).double()
    softmax = (q @ k.mT / 8**0.5).softmax(-1)
    off = []
    for name in ("taylor1", "taylor2"):
        features = ops.feature_map(name)
        weights = features(q) @ features(k).mT
        off.append(float((weights / weights.sum(-1, keepdim=True) - softmax).abs().mean()))
    assert off[1] < 0.5 * off[0]


def test_refuses_what_has_no_known_system():
    with pytest.raises(TypeError, match="no dynamical system is known of a layer Linear"):
        dsf_matrices(nn.Linear(2, 2), tokens(5))
    with pytest.raises(ValueError, match="multiple of heads, got 5 heads"):
        build(heads=5)
