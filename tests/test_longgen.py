import pytest
import torch

import foveate
from attached import check_differs_from_plain, check_padded_row_equals_row_alone
from foveate import ops
from foveate.attention.base import Call
from sparse_checks import causal_keep, check_common, qkv, softmax_over


def longgen(**options):
    return foveate.create("longgen", **{"window": 6, "sinks": 2, "block": 4} | options)


def at(layer, layers=6):
    return Call(layer=layer, layers=layers)


@pytest.mark.parametrize(
    ("layers", "full"), [(6, {2, 3}), (30, set(range(10, 20))), (7, {2, 3, 4}), (1, {0}), (2, {0})]
)
def test_the_middle_third_is_full(layers, full):
    assert longgen().full(layers) == full


def test_full_layers_are_dense_and_others_see_sinks_and_window():
    q, k, v = qkv(50)
    m = longgen(full_layers=(1, -1))
    keep = torch.tensor([[j < 2 or abs(i - j) < 6 for j in range(50)] for i in range(50)])
    part = softmax_over(q, k, v, keep & causal_keep(50, 50))
    for layer in range(6):
        want = ops.attend(q, k, v, causal=True) if layer in (1, 5) else part
        torch.testing.assert_close(m(q, k, v, call=at(layer)), want, atol=1e-5, rtol=1e-4)


def test_strides_are_those_of_sharded_attention():
    q, k, v = qkv(50)
    want = foveate.create("s2_sharded", block=4, local_blocks=1, stride=3)(q, k, v)
    got = longgen(sparse="strides", stride=3)(q, k, v, call=at(0))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sparse", ["window", "strides"])
@pytest.mark.parametrize("layer", [0, 2])
def test_decode_equals_prefill_row(sparse, layer):
    q, k, v = qkv(50)
    m = longgen(sparse=sparse, stride=3)
    whole = m(q, k, v, call=at(layer))
    for t in (3, 30, 49):
        row = slice(t, t + 1)
        call = Call(layer=layer, layers=6, phase="decode")
        step = m(q[:, :, row], k[:, :, : t + 1], v[:, :, : t + 1], call=call)
        torch.testing.assert_close(step, whole[:, :, row], atol=1e-5, rtol=1e-4)


def stack(x, m, layers=4):
    """A model of nothing but attention layers."""
    for layer in range(layers):
        x = x + m(x, x, x, scale=0.01, call=at(layer, layers))
    return x


def reached(m):
    """Which tokens (L,) the last output of four layers depends on."""
    x = torch.randn(1, 2, 60, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (grad,) = torch.autograd.grad(stack(x, m)[:, :, -1].sum(), x)
    return grad.abs().sum((0, 1, 3)) > 0


def test_windows_add_up_over_layers_and_full_layers_reach_everything():
    seen = reached(longgen(full_layers=()))
    back = torch.arange(60) >= 59 - 4 * 5
    assert torch.equal(seen, back | (torch.arange(60) < 2))
    assert reached(longgen()).all()


@pytest.mark.parametrize("sparse", ["window", "strides"])
def test_common_claims(sparse):
    check_common(longgen(sparse=sparse, full_layers=()), *qkv(90, batch=2))


def test_inside_a_model(tiny_llama):
    m = longgen(full_layers=(1,))
    check_differs_from_plain(tiny_llama, prefill=m, decode=m)
    check_padded_row_equals_row_alone(tiny_llama, prefill=m, decode=m)


@pytest.mark.parametrize(
    "option", [{"window": 0}, {"sinks": -1}, {"stride": 0}, {"local_blocks": 0}, {"sparse": "no"}]
)
def test_refuses_bad_options(option):
    with pytest.raises((ValueError, TypeError), match=next(iter(option))):
        longgen(**option)
