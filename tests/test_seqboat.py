import pytest
import torch
from torch.nn.functional import silu

import foveate
from layer_checks import check_rows_go_on_as_alone, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    given = {"dim": 32, "width": 16, "states": 4, "window": 3} | options
    return foveate.create("seqboat", **given)


def averages(part, x):
    """Moving averages of a row x (L, dim) by their kernel."""
    p, q = torch.sigmoid(part.rise), 1 - torch.sigmoid(part.rise) * torch.sigmoid(part.fall)
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for j in range(t + 1):
            kernel = (part.read * 4**-0.5 * p * part.write * q ** (t - j)).sum(-1)
            out[t] += kernel * x[j]
    return out


def rotated(x, at):
    turns = at * 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    a, b = x.chunk(2, -1)
    cos, sin = turns.cos(), turns.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def definition(layer, x, causal):
    """One row (L, dim), token by token, and which tokens were activated."""
    mean = averages(layer.ahead, x)
    if not causal:
        mean = mean + averages(layer.back, x.flip(0)).flip(0)
    m = silu(mean + layer.skip * x)
    logits = layer.route(m)
    chances = (logits / layer.log_temperature.exp()).softmax(-1)[:, 1]
    active = [t for t in range(len(x)) if logits[t, 1] > logits[t, 0]]
    shared, gate, v = silu(layer.inner(m)).split((16, 64, 64), -1)
    y = layer.plain(m) + x
    for i, t in enumerate(active):
        last = i + 1 if causal else i + layer.window + 1
        seen = active[max(0, i - layer.window) : last]
        q = rotated(shared[t] * layer.scales[0] + layer.shifts[0], t)
        keys = [rotated(shared[j] * layer.scales[1] + layer.shifts[1], j) for j in seen]
        weights = (torch.stack(keys) @ q / 4).softmax(0)
        y[t] = y[t] + chances[t] * layer.out((weights @ v[seen]) * gate[t])
    return silu(y), active


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_is_its_definition(causal, window):
    layer, x = build(window=window), tokens(19)
    with torch.no_grad():
        got = layer(x, causal=causal)
        for row, mine in zip(x, got, strict=True):
            want, active = definition(layer, row, causal)
            assert 3 < len(active) < 17
            torch.testing.assert_close(mine, want, atol=1e-5, rtol=1e-4)


def decided(layer, bias):
    with torch.no_grad():
        layer.route.weight.zero_()
        layer.route.bias.copy_(torch.tensor([0.0, bias]))
    return layer


def test_without_activation_averages_are_all():
    layer, x = decided(build(), -1.0), tokens(19)
    with torch.no_grad():
        mean, _ = layer.ahead(x, torch.ones(2, 19, dtype=torch.bool), None)
        want = silu(layer.plain(silu(mean + layer.skip * x)) + x)
        got, state = layer(x, return_state=True)
        torch.testing.assert_close(got, want)
    assert state.held is None and state.active.tolist() == [0, 0]


def test_with_all_tokens_and_a_wide_window_it_is_a_gated_attention_unit():
    layer, x = decided(build(window=50, theta=None), 1.0), tokens(19)
    with torch.no_grad():
        mean, _ = layer.ahead(x, torch.ones(2, 19, dtype=torch.bool), None)
        m = silu(mean + layer.skip * x)
        shared, gate, v = silu(layer.inner(m)).split((16, 64, 64), -1)
        q, k = (shared * s + b for s, b in zip(layer.scales, layer.shifts, strict=True))
        later = torch.ones(19, 19, dtype=torch.bool).triu(1)
        weights = (q @ k.mT / 4).masked_fill(later, -torch.inf).softmax(-1)
        share = torch.sigmoid(1 / layer.log_temperature.exp())
        want = silu(layer.plain(m) + share * layer.out((weights @ v) * gate) + x)
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_the_router_learns_through_the_weight_alone():
    layer, x = build(), tokens(19)
    layer(x).sum().backward()
    assert layer.route.weight.grad.abs().sum() > 0
    idle = decided(build(), -1.0)
    idle(x).sum().backward()
    assert idle.route.weight.grad is None or idle.route.weight.grad.abs().sum() == 0


def test_keeps_a_window_of_activated_tokens():
    layer, x = build(), tokens(40)
    with torch.no_grad():
        _, state = layer(x[:, :30], return_state=True)
        for t in range(30, 40):
            _, state = layer.step(x[:, t], state)
        counts = [len(definition(layer, row, True)[1]) for row in x]
    assert state.active.tolist() == counts and counts[0] != counts[1]
    assert state.held.real.sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("causal", [True, False])
def test_rows_do_not_depend_on_how_many_tokens_others_activate(causal):
    layer, x = build(), tokens(19)
    busy = x.clone()
    with torch.no_grad():
        pull = layer.route.weight[1] - layer.route.weight[0]
        busy[1] += 5 * pull / pull.norm()
        torch.testing.assert_close(
            layer(busy, causal=causal)[0], layer(x, causal=causal)[0], atol=1e-6, rtol=1e-5
        )


def test_rows_of_different_lengths_go_on_as_alone():
    layer, x = build(), tokens(20)
    check_rows_go_on_as_alone(layer, x, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"states": 0}, "states must be at least 1"),
        ({"width": 15}, "even width, got 15"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
