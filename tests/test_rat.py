import pytest
import torch

import foveate
from foveate import ops
from layer_checks import plain_attention, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("rat", **{"dim": 32, "heads": 4, "chunk": 4} | options)


def terms(layer, x):
    """Output gate, values, gates, and queries and keys of each head (B, L, H, K)."""
    shown, v, gate, q, k = (x @ layer.inner.weight.T).split(layer.sizes, -1)
    groups = [h % (len(q[0, 0]) // 8) for h in range(4)]
    q, k = (y.unflatten(-1, (-1, 8))[:, :, groups] for y in (q, k))
    return shown.sigmoid(), v.unflatten(-1, (4, 8)), (gate + layer.bias).sigmoid(), q, k


def rotated(x, turn):
    angles = turn * 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def definition(layer, x):
    """The layer one token and one head at a time."""
    shown, v, gate, q, k = terms(layer, x)
    gate = gate.unflatten(-1, (4, 8))
    chunk, keys, values = layer.chunk, [], []
    running_k = running_v = None
    out = torch.zeros_like(v)
    for t in range(x.shape[1]):
        g = gate[:, t]
        if t % chunk == 0:
            running_k = running_v = torch.zeros_like(v[:, 0])
        running_k = g * running_k + (1 - g) * k[:, t]
        running_v = g * running_v + (1 - g) * v[:, t]
        seen_k = torch.stack([*keys, rotated(running_k, t // chunk)], 2)
        seen_v = torch.stack([*values, running_v], 2)
        query = rotated(q[:, t], t // chunk)
        weights = (seen_k @ query[..., None] * 8**-0.5).softmax(2)
        out[:, t] = (weights * seen_v).sum(2)
        if t % chunk == chunk - 1:
            keys.append(rotated(running_k, t // chunk))
            values.append(running_v)
    return (shown * out.flatten(2)) @ layer.out.weight.T


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [3, 8, 18])
def test_is_its_definition(groups, length):
    layer, x = build(groups=groups), tokens(length)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), definition(layer, x), atol=1e-5, rtol=1e-4)


def test_chunks_of_one_token_are_softmax_attention():
    layer, x = build(chunk=1), tokens(13)
    with torch.no_grad():
        layer.bias.fill_(-200.0)
        shown, v, _, q, k = terms(layer, x)
        at = torch.arange(13)
        q, k = (torch.stack([rotated(y[:, t], t) for t in at], 2) for y in (q, k))
        out = plain_attention(q, k, v.transpose(1, 2), True).transpose(1, 2).flatten(2)
        want = (shown * out) @ layer.out.weight.T
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_one_chunk_is_a_gated_recurrence():
    layer, x = build(chunk=16), tokens(13)
    with torch.no_grad():
        shown, v, gate, _, _ = terms(layer, x)
        h, outs = torch.zeros(2, 32), []
        for t in range(13):
            h = gate[:, t] * h + (1 - gate[:, t]) * v[:, t].flatten(1)
            outs.append(h)
        want = (shown * torch.stack(outs, 1)) @ layer.out.weight.T
        torch.testing.assert_close(layer(x), want, atol=1e-6, rtol=1e-5)


def test_long_rows_are_attended_to_in_tiles():
    layer, x = build(chunk=1, groups=4), tokens(600)
    with torch.no_grad():
        layer.bias.fill_(-200.0)
        shown, v, _, q, k = terms(layer, x)
        at = torch.arange(600)[:, None]
        q, k = (rotated(y.transpose(1, 2), at) for y in (q, k))
        out = plain_attention(q, k, v.transpose(1, 2), True).transpose(1, 2).flatten(2)
        torch.testing.assert_close(
            layer(x), (shown * out) @ layer.out.weight.T, atol=1e-5, rtol=1e-3
        )


def test_a_prefix_gives_the_same():
    layer, x = build(), tokens(14)
    with torch.no_grad():
        whole = layer(x)
        for length in (3, 8, 9):
            torch.testing.assert_close(layer(x[:, :length]), whole[:, :length], atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [3, 4, 11, 16])
def test_keeps_a_key_of_every_finished_chunk(length):
    layer, x = build(), tokens(length)
    with torch.no_grad():
        _, state = layer(x[:, :2], return_state=True)
        for t in range(2, length):
            _, state = layer.step(x[:, t], state)
    assert state.keys.shape == state.values.shape == (2, 4, length // 4, 8)
    assert state.s.shape == (2, 2, 32)


def test_rows_at_different_places_in_their_chunks_go_on_as_alone():
    layer, x = build(), tokens(20)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, :3] = False
    with torch.no_grad():
        y, state = layer(x[:, :10], mask=ops.padding(valid), return_state=True)
        rest, _ = layer(x[:, 10:], state=state, return_state=True)
        got = torch.cat((y, rest), 1)
        torch.testing.assert_close(got[0], layer(x[:1])[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got[1, 3:], layer(x[1:, 3:])[0], atol=1e-5, rtol=1e-4)


def test_gates_start_with_reaches_within_a_chunk():
    for chunk, high in ((64, 63), (2, 1), (1, 1)):
        reach = build(dim=512, heads=4, chunk=chunk).bias.detach().exp()
        assert 1 <= reach.min() <= reach.max() <= high + 1e-3
    assert build(dim=512, heads=4, chunk=64).bias.detach().exp().max() > 55


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"heads": 5}, "multiple of heads, got 5"),
        ({"groups": 3}, "heads must be a multiple of groups, got 4 and 3"),
        ({"dim": 20}, "even width, got 5"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
