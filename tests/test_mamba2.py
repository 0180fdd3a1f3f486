import pytest
import torch
from torch.nn.functional import silu, softplus

import foveate
from foveate import ops
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("mamba2", **{"dim": 32, "heads": 4, "states": 6, "groups": 2} | options)


def parts(layer, x):
    """What the layer makes of x, written down: gate, inputs, B and C (L, H, ·), steps."""
    gate, mixed, step = (x @ layer.inner.weight.T).split((64, 88, 4), -1)
    seen = torch.cat((torch.zeros(x.shape[0], 3, 88), mixed), 1)
    taps = [seen[:, i : i + x.shape[1]] * layer.convs.weight[:, i] for i in range(4)]
    inputs, b, c = silu(sum(taps) + layer.convs.bias).split((64, 12, 12), -1)
    b, c = (y.unflatten(-1, (2, 6))[:, :, [0, 0, 1, 1]] for y in (b, c))
    return gate, inputs.unflatten(-1, (4, 16)), b, c, softplus(step + layer.step_bias)


def test_the_layer_is_its_definition():
    layer, x = build(), tokens(9)
    with torch.no_grad():
        layer.norm.copy_(torch.rand(64))
        gate, inputs, b, c, step = parts(layer, x)
        state, outs = torch.zeros(2, 4, 6, 16), []
        for t in range(9):
            kept = torch.exp(-layer.log_a.exp() * step[:, t])
            written = step[:, t, :, None] * inputs[:, t]
            state = kept[..., None, None] * state + b[:, t, ..., None] * written[:, :, None]
            read = (c[:, t, ..., None] * state).sum(2) + layer.skip[:, None] * inputs[:, t]
            outs.append(read.flatten(1))
        y = torch.stack(outs, 1) * silu(gate)
        halves = [h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() for h in y.split(32, -1)]
        want = (torch.cat(halves, -1) * layer.norm) @ layer.out.weight.T
        got, after = layer(x, return_state=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.s, state, atol=1e-5, rtol=1e-4)


def test_is_linear_attention_under_a_decay():
    layer, x = build(), tokens(9)
    with torch.no_grad():
        _, inputs, b, c, step = parts(layer, x)
        inputs, b, c, step = (y.transpose(1, 2) for y in (inputs, b, c, step))
        log = -(layer.log_a.exp()[:, None] * step).cumsum(-1)
        weights = (c @ b.mT * torch.exp(log[..., None] - log[:, :, None])).tril()
        want = weights @ (step[..., None] * inputs)
        decay = -layer.log_a.exp()[:, None] * step
        got, _ = ops.scan(c, b, step[..., None] * inputs, decay=decay, scale=1.0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_starts_with_rates_up_to_16_and_small_steps():
    layer = build(heads=64, dim=512, groups=1)
    rates, steps = layer.log_a.detach().exp(), softplus(layer.step_bias.detach())
    assert 1 <= rates.min() < 4 and 13 < rates.max() <= 16
    assert 1e-3 <= steps.min() < 0.01 < steps.max() <= 0.1


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_mixer_of_transformers(groups):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 6}
    config = Mamba2Config(**sizes, n_groups=groups, chunk_size=8, num_hidden_layers=1)
    torch.manual_seed(0)
    peer, layer, x = Mamba2Mixer(config, 0).eval(), build(groups=groups), tokens(21)
    pairs = [
        (layer.inner.weight, peer.in_proj.weight),
        (layer.convs.weight, peer.conv1d.weight[:, 0]),
        (layer.convs.bias, peer.conv1d.bias),
        (layer.step_bias, peer.dt_bias),
        (layer.log_a, peer.A_log),
        (layer.skip, peer.D),
        (layer.norm, peer.norm.weight),
        (layer.out.weight, peer.out_proj.weight),
    ]
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)
        torch.testing.assert_close(layer(x), peer(x), atol=1e-5, rtol=1e-4)


def test_padding_on_the_right_does_not_let_the_state_decay():
    layer, x = build(), tokens(9)
    valid = torch.arange(9).expand(2, 9) < 6
    with torch.no_grad():
        _, padded = layer(x, mask=ops.padding(valid), return_state=True)
        _, alone = layer(x[:, :6], return_state=True)
    torch.testing.assert_close(padded.s, alone.s)
    torch.testing.assert_close(padded.conv[0], alone.conv[0])


def test_the_state_has_one_number_for_each_channel_and_state():
    _, after = build()(tokens(9), return_state=True)
    assert after.s.shape == (2, 4, 6, 16) and after.s.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": 3}, "heads must be a multiple of those of B: 4, 3"),
        ({"heads": 5}, "dim 32 times 2 must be a multiple of heads, got 5 heads"),
        ({"states": 0}, "states must be at least 1"),
        ({"groups": 0}, "heads of B must be at least 1"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
