import pytest
import torch
from torch.nn.functional import silu

import foveate
from foveate import ops
from foveate.nn._recurrent import state_bytes
from foveate.nn.linear.hymba import layer_kinds
from layer_checks import check_rows_go_on_as_alone, tokens

SMALL = {"dim": 32, "heads": 4, "kv_heads": 2, "depth": 6, "window": 4, "meta": 3, "states": 4}


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("hymba", **SMALL | options)


def rotated(x, at):
    turns = at[:, None] * 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    a, b = x.chunk(2, -1)
    cos, sin = turns.cos(), turns.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def layer_by_definition(layer, x, window, meta, lent=None):
    """A layer with full maps; x begins with the meta tokens. Gives keys and values too."""
    heads, n = layer.heads, x.shape[1]
    at = torch.arange(n)
    parts = (layer.norms[0](x) @ heads.inner.weight.T).split(heads.sizes, -1)
    q, k, v = (y.unflatten(-1, (-1, 16)).transpose(1, 2) for y in (parts[0], *parts[3:]))
    q = rotated(q, at)
    if lent is None:
        lent = tuple(y.repeat_interleave(2, 1) for y in (rotated(k, at), v))
    far = at[:, None] - at
    seen = (far >= 0) & ((far <= window) | (at < meta))
    weights = (q @ lent[0].mT / 4).masked_fill(~seen, -torch.inf).softmax(-1)
    attended = (weights @ lent[1]).transpose(1, 2).flatten(2)
    state, _, _ = heads.scan(parts[1])
    both = heads.norms[0](attended) + heads.norms[1](state * silu(parts[2]))
    x = x + (both / 2) @ heads.out.weight.T
    return x + layer.mlp(layer.norms[1](x)), lent


def test_equals_its_layers_with_full_maps():
    model, x = build(), tokens(13)
    with torch.no_grad():
        y = torch.cat((model.meta.expand(2, -1, -1), x), 1)
        lent = None
        for layer, kind in zip(model.layers, layer_kinds(6), strict=True):
            window = 100 if kind == "all" else 4
            y, lent = layer_by_definition(layer, y, window, 3, lent if kind == "borrows" else None)
        torch.testing.assert_close(model(x), y[:, 3:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("depth", "kinds"),
    [
        (1, "a"),
        (3, "aaa"),
        (6, "aoaoba"),
        (32, "a" + "ob" * 7 + "a" + "ob" * 7 + "o" + "a"),
    ],
)
def test_which_layers_see_all_and_which_borrow(depth, kinds):
    assert "".join(kind[0] for kind in layer_kinds(depth)) == kinds


def test_without_the_norm_of_the_scan_attention_alone_is_halved():
    model, x = build(depth=1), tokens(9)
    heads = model.layers[0].heads
    with torch.no_grad():
        heads.norms[1].weight.zero_()
        at = torch.arange(9).expand(2, 9)
        y, _, _ = heads(x, at, at >= 0, None, (None, None))
        q, _, _, k, v = (x @ heads.inner.weight.T).split(heads.sizes, -1)
        q, k, v = (z.unflatten(-1, (-1, 16)).transpose(1, 2) for z in (q, k, v))
        q, k = rotated(q, at[0]), rotated(k, at[0])
        out = ops.attend(q, k, v, causal=True).transpose(1, 2).flatten(2)
        want = heads.norms[0](out) / 2 @ heads.out.weight.T
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-4)


def test_meta_tokens_reach_every_token():
    model = build(depth=4)
    y = model(tokens(20))
    for token in (0, 10, 19):
        (grad,) = torch.autograd.grad(y[0, token].sum(), model.meta, retain_graph=True)
        assert (grad.abs().sum(1) > 0).all()


def test_keeps_a_window_for_two_layers_and_all_tokens_in_three():
    model, x = build(), tokens(20)
    with torch.no_grad():
        _, state = model(x, return_state=True)
        _, state = model.step(x[:, 0], state)
    kinds = layer_kinds(6)
    for kind, held in zip(kinds, state.held, strict=True):
        if kind == "borrows":
            assert held is None
        else:
            assert held.keys.shape == (2, 2, 24 if kind == "all" else 3 + 4, 16)
    scans = sum(state_bytes(scan) for scan in state.scans)
    assert state_bytes(state) == scans + 2 * 4 * (2 * 2 * 16) * (3 * 24 + 1 * 7 + 1 * 7)


def test_rows_that_have_seen_more_than_others_go_on_as_alone():
    model, x = build(), tokens(20)
    check_rows_go_on_as_alone(model, x, 6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"meta": -1}, "meta must be at least 0, got -1"),
        ({"heads": 6}, "multiple of heads, got 6"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
