import itertools

import pytest
import torch

import foveate
from foveate.nn.linear.tnl import TransNormer
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("tnl", **{"dim": 32, "heads": 4, "layers": 2} | options)


def heads(layer, x):
    """q, k and v (B, H, L, 8) in float64."""
    parts = layer.qkv(x).double().unflatten(-1, (4, 3, 8)).permute(3, 0, 2, 1, 4)
    q, k = (y * y.sigmoid() for y in parts[:2])
    return q, k, parts[2]


@pytest.mark.parametrize("index", [0, 1])
def test_equals_the_definition_pair_by_pair(index):
    layer, x = build(index=index), tokens(30)
    with torch.no_grad():
        q, k, v = heads(layer, x)
        out = torch.zeros_like(v)
        slopes = torch.tensor([8 * h / 4 * (1 - index / 2) for h in range(4)]).double()
        for t in range(30):
            for j in range(t + 1):
                weight = q[:, :, t] * k[:, :, j]
                if index == 0:
                    weight = weight * torch.cos(layer.angles[:, 0].double() * (t - j))
                weight = weight.sum(-1) * torch.exp(-slopes * (t - j))
                out[:, :, t] += weight[..., None] * v[:, :, j]
        out = out.transpose(1, 2).flatten(2)
        out = out / out.pow(2).mean(-1, keepdim=True).sqrt()
        want = layer.readout.out((out * layer.readout.gate(x)).float())
        torch.testing.assert_close(layer(x), want, atol=2e-5, rtol=1e-4)


def test_the_angles_start_as_those_of_rotations_over_all_heads():
    angles = build().angles
    want = 10_000.0 ** (-2 * torch.arange(32) / 32)
    torch.testing.assert_close(angles.detach().flatten(), want)
    assert build(index=1).angles is None


def test_upper_layers_remember_longer_and_the_first_head_all():
    slopes = [build(index=index, layers=4).slopes for index in range(4)]
    for lower, upper in itertools.pairwise(slopes):
        assert all(a > b for a, b in zip(lower[1:], upper[1:], strict=True))
    assert all(layer[0] == 0 for layer in slopes)


def test_outputs_do_not_grow_with_length_though_the_state_does():
    layer, x = build(), tokens(400)
    with torch.no_grad():
        y, state = layer(x, return_state=True)
        _, early = layer(x[:, :40], return_state=True)
    assert state.s[:, 0].norm() > 2 * early.s[:, 0].norm()
    assert y[:, -40:].std() < 1.5 * y[:, :40].std()


def model(layers=3):
    torch.manual_seed(0)
    return TransNormer(32, 4, layers)


def test_the_model_is_made_of_gated_layers_and_norms_without_weights():
    stack, x = model(2), tokens(20)
    assert not any("norm" in name for name, _ in stack.named_parameters())
    with torch.no_grad():
        y = x
        for block in stack.blocks:
            y = y + block.layer(y / y.pow(2).mean(-1, keepdim=True).sqrt())
            z = y / y.pow(2).mean(-1, keepdim=True).sqrt()
            y = y + block.mlp.down(block.mlp.gate(z) * block.mlp.up(z))
        want = y / y.pow(2).mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(stack(x), want, atol=1e-5, rtol=1e-4)
    assert [block.layer.angles is None for block in stack.blocks] == [False, True]


def test_the_model_decodes_what_it_gives_at_once():
    stack, x = model(), tokens(30)
    with torch.no_grad():
        y, state = stack(x[:, :20], return_state=True)
        outs = [y]
        for t in range(20, 30):
            y, state = stack.step(x[:, t], state)
            outs.append(y[:, None])
        torch.testing.assert_close(torch.cat(outs, 1), stack(x), atol=1e-5, rtol=1e-4)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="index must be in"):
        build(index=2)
    with pytest.raises(ValueError, match="mlp must be at least 1, got 0"):
        TransNormer(32, 4, 2, mlp=0)
