import itertools

import pytest
import torch

import foveate
from foveate.nn import Transformer
from foveate.nn.linear._lower_bound import LowerBound
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("hgrn", **{"dim": 32} | options)


def bound_of(logits, index):
    """Lower bounds of a layer: running sums of a softmax over layers, less its first share."""
    shares = logits.double().softmax(0)
    return shares.cumsum(0)[index] - shares[0]


def drawn(index, layers=4, width=32):
    torch.manual_seed(index)
    bound = LowerBound(width, index, layers)
    if bound.logits is not None:
        torch.nn.init.normal_(bound.logits)
    return bound


@pytest.mark.parametrize("index", [0, 1, 3])
def test_gates_are_the_definition_and_never_below_their_bound(index):
    bound, x = drawn(index), 3 * tokens(20)
    lowest = torch.zeros(32).double() if index == 0 else bound_of(bound.logits, index)
    with torch.no_grad():
        gate = bound(x).double().exp()
    torch.testing.assert_close(
        gate, lowest + (1 - lowest) * x.double().sigmoid(), atol=1e-6, rtol=1e-5
    )
    assert bool((gate >= lowest * (1 - 1e-6)).all())


def test_bounds_rise_with_depth_and_stay_below_one():
    logits, far = drawn(1).logits, torch.full((1, 32), -1e4)
    bounds = []
    for index in range(4):
        bound = LowerBound(32, index, 4)
        if index:
            bound.logits = logits
        bounds.append(bound(far).exp()[0])
    assert torch.equal(bounds[0], torch.zeros(32))
    for lower, upper in itertools.pairwise(bounds):
        assert bool((upper > lower).all()) and bool((upper < 1).all())


@pytest.mark.parametrize("expand", [1.0, 2.0])
def test_equals_the_definition_token_by_token(expand):
    layer, x = build(index=2, layers=3, expand=expand), tokens(70)
    with torch.no_grad():
        lowest = bound_of(layer.bound.logits, 2)
        keep = lowest + (1 - lowest) * layer.forget(x).double().sigmoid()
        new = layer.write(x).double()
        new = new * new.sigmoid() * (1 - keep)
        h, outs = torch.zeros_like(new[:, 0]), []
        for t in range(70):
            h = keep[:, t] * h + new[:, t]
            outs.append(h)
        out = torch.stack(outs, 1)
        out = out / (out.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        gate = layer.readout.gate(x)
        want = layer.readout.out((out * gate * gate.sigmoid()).float())
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_the_state_is_a_vector():
    _, state = build()(tokens(9), return_state=True)
    assert state.s.shape == (2, 32) and state.s.dtype == torch.float32


def test_gradients_of_bounds_are_finite_even_for_closed_gates():
    bound = drawn(2)
    bound(torch.tensor([-1e4, 0.0, 1e4] * 11)[:32]).sum().backward()
    assert torch.isfinite(bound.logits.grad).all() and bound.logits.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["hgrn", "hgrn2"])
def test_layers_of_a_model_share_their_bounds(name):
    model = Transformer(16, 32, f"{name}, dense", layers=6, mlp=0)
    layers = [model.stack.blocks[i].layer for i in (0, 2, 4)]
    assert layers[0].bound.logits is None
    assert layers[1].bound.logits is layers[2].bound.logits
    assert layers[1].bound.logits.shape == (6, 32)
    names = [n for n, _ in model.named_parameters() if "bound" in n]
    assert len(names) == 1


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"index must be in \[0, layers\), got 3 of 3"):
        build(index=3, layers=3)
    with pytest.raises(ValueError, match="share lower bounds must be alike"):
        Transformer(16, 32, "hgrn, hgrn:expand=2.0, hgrn", mlp=0)
