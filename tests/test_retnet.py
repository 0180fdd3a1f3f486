import pytest
import torch

import foveate
from layer_checks import heads_of, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("retnet", **{"dim": 32, "heads": 4} | options)


def retained(layer, x, decays, theta):
    """Heads before the norm, by the definition, with L×L maps in float64."""
    q, k = (heads_of(part, x, 8, theta) for part in (layer.q, layer.k))
    v = heads_of(layer.v, x, layer.v_width)
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    kept = torch.stack([torch.tensor(g).double() ** distance for g in decays]).tril()
    return ((q @ k.mT / 8**0.5).double() * kept) @ v.double()


def before_norm(layer, x):
    seen = {}
    hook = layer.readout.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    layer(x)
    hook.remove()
    return seen["heads"]


@pytest.mark.parametrize("theta", [None, 100.0])
def test_heads_equal_the_definition(theta):
    layer, x = build(theta=theta), tokens(70)
    with torch.no_grad():
        want = retained(layer, x, (31 / 32, 63 / 64, 127 / 128, 255 / 256), theta)
        torch.testing.assert_close(before_norm(layer, x).double(), want, atol=1e-5, rtol=1e-4)


def test_each_head_is_normed_and_gated_by_swish():
    layer, x = build(), tokens(20)
    with torch.no_grad():
        heads = before_norm(layer, x).transpose(1, 2)
        heads = heads / (heads.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        gate = layer.readout.gate(x)
        want = layer.readout.out(heads.flatten(2) * gate * gate.sigmoid())
        torch.testing.assert_close(layer(x), want, atol=1e-6, rtol=1e-5)


def test_without_decay_it_is_linear_attention_without_a_denominator():
    layer, x = build(theta=None), tokens(40)
    layer.log_decay = (0.0,) * 4
    with torch.no_grad():
        q, k = (heads_of(part, x, 8) for part in (layer.q, layer.k))
        want = (q @ k.mT / 8**0.5).tril() @ heads_of(layer.v, x, 16)
        torch.testing.assert_close(before_norm(layer, x), want, atol=1e-5, rtol=1e-4)


def test_the_size_of_values_is_seen_before_the_norm_and_not_after():
    layer, x = build(), tokens(30)
    with torch.no_grad():
        heads, out = before_norm(layer, x), layer(x)
        layer.v.weight.mul_(3.0)
        torch.testing.assert_close(before_norm(layer, x), 3 * heads)
        off = (layer(x) - out).norm() / out.norm()
    assert off < 1e-2


def test_positions_go_on_where_the_state_ended():
    layer, x = build(theta=3.0), tokens(30)
    with torch.no_grad():
        _, state = layer(x[:, :17], return_state=True)
        rest = layer(x[:, 17:], state=state)
        torch.testing.assert_close(rest, layer(x)[:, 17:], atol=1e-5, rtol=1e-4)
    assert state.pos.tolist() == [17, 17] and state.s.shape == (2, 4, 8, 16)


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="even width, got 1"):
        build(heads=32)
    with pytest.raises(ValueError, match="multiple of heads, got 5 heads"):
        build(heads=5)
