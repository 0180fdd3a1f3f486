import pytest
import torch
from torch.nn.functional import silu, softplus

import foveate
from foveate.nn.linear.s6 import S6, selective_scan
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("s6", **{"dim": 32, "states": 5} | options)


def terms(length, seed=0):
    made = torch.Generator().manual_seed(seed)
    x, step = torch.randn(2, 2, length, 6, generator=made, dtype=torch.float64)
    b, c = torch.randn(2, 2, length, 5, generator=made, dtype=torch.float64)
    a = -torch.rand(6, 5, generator=made, dtype=torch.float64).mul(4)
    return x, softplus(step), a, b, c


def loop(x, step, a, b, c, state=None):
    h = torch.zeros(x.shape[0], *a.shape, dtype=x.dtype) if state is None else state
    outs = []
    for t in range(x.shape[1]):
        kept = torch.exp(step[:, t, :, None] * a)
        h = kept * h + (step[:, t] * x[:, t])[..., None] * b[:, t, None]
        outs.append((h * c[:, t, None]).sum(-1))
    return torch.stack(outs, 1), h


@pytest.mark.parametrize("length", [1, 64, 131])
def test_chunks_are_the_token_loop(length):
    given = terms(length)
    start = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(7)).double()
    for state in (None, start):
        got, want = selective_scan(*given, state), loop(*given, state)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_gradients_are_those_of_the_token_loop():
    def gradients(form):
        given = [x.requires_grad_() for x in terms(70)]
        out, last = form(*given)
        return torch.autograd.grad(out.square().sum() + last.sum(), given)

    torch.testing.assert_close(gradients(selective_scan), gradients(loop), atol=1e-10, rtol=1e-8)


def test_the_layer_is_its_definition():
    layer, x = build(), tokens(9)
    with torch.no_grad():
        inner, gate = (x @ layer.inner.weight.T).split((64, 64), -1)
        scan = layer.scan
        seen = torch.cat((torch.zeros(2, 3, 64), inner), 1)
        taps = [seen[:, i : i + 9] * scan.conv.weight[:, i] for i in range(4)]
        u = silu(sum(taps) + scan.conv.bias)
        raw, b, c = (u @ scan.terms.weight.T).split((2, 5, 5), -1)
        step = softplus(raw @ scan.step.weight.T + scan.step_bias)
        y, _ = loop(u, step, -scan.log_a.exp(), b, c)
        want = ((y + scan.skip * u) * silu(gate)) @ layer.out.weight.T
        torch.testing.assert_close(layer(x), want, atol=1e-6, rtol=1e-5)


def test_without_a_step_the_state_stays_and_the_token_passes():
    layer, x = build(), tokens(6)
    with torch.no_grad():
        _, before = layer(x, return_state=True)
        layer.scan.step.weight.zero_()
        layer.scan.step_bias.fill_(-200.0)
        _, after = layer(x, state=before, return_state=True)
        torch.testing.assert_close(after.s, before.s, atol=0, rtol=0)
        empty = layer(x)
        layer.scan.skip.zero_()
        assert layer(x).abs().max() == 0 < empty.abs().max()


def test_every_state_decays():
    layer = build()
    with torch.no_grad():
        step, _, _ = layer.scan.selected(tokens(50, dim=64))
        kept = torch.exp(step[..., None] * -layer.scan.log_a.exp())
    assert (step > 0).all() and (kept < 1).all() and (kept >= 0).all()


def test_starts_from_rates_1_to_n_and_small_steps():
    layer = build()
    rates = layer.scan.log_a.detach().exp()
    torch.testing.assert_close(rates, torch.arange(1.0, 6.0).expand(64, 5))
    steps = softplus(layer.scan.step_bias.detach())
    assert 1e-3 <= steps.min() < 0.01 < steps.max() <= 0.1


def test_equals_the_mixer_of_transformers():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=32, state_size=5, time_step_rank=2, num_hidden_layers=1)
    torch.manual_seed(0)
    peer, layer, x = MambaMixer(config, 0).eval(), S6(32, states=5), tokens(21)
    scan = layer.scan
    weights = [
        (layer.inner.weight, peer.in_proj.weight),
        (scan.conv.weight, peer.conv1d.weight[:, 0]),
        (scan.conv.bias, peer.conv1d.bias),
        (scan.terms.weight, peer.x_proj.weight),
        (scan.step.weight, peer.dt_proj.weight),
        (scan.step_bias, peer.dt_proj.bias),
        (scan.log_a, peer.A_log),
        (scan.skip, peer.D),
        (layer.out.weight, peer.out_proj.weight),
    ]
    with torch.no_grad():
        for mine, theirs in weights:
            mine.copy_(theirs)
        torch.testing.assert_close(layer(x), peer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"states": 0}, "states must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"conv": 0}, "width must be at least 1"),
        ({"expand": 0.3}, "dim 32 times 0.3 must be a multiple"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
