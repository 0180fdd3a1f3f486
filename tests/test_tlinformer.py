import pytest
import torch

import foveate
from foveate import ops
from layer_checks import check_rows_go_on_as_alone, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    given = {"dim": 32, "heads": 4, "blocks": 2, "block_layers": 3, "window": 4, "history": 3}
    return foveate.create("tlinformer", **given | options)


def rotated(x, at):
    turns = torch.as_tensor(at)[:, None] * 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
    a, b = x.chunk(2, -1)
    cos, sin = turns.cos(), turns.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def split(layer, x, at):
    q, k, v = (layer.norms[0](x) @ layer.qkv.weight.T).split(32, -1)
    q, k, v = (y.unflatten(-1, (4, 8)).transpose(0, 1) for y in (q, k, v))
    return rotated(q, at), rotated(k, at), v


def attention(q, k, v, causal=False):
    weights = q @ k.mT / 8**0.5
    if causal:
        later = torch.ones(weights.shape[-2:], dtype=torch.bool).triu(1)
        weights = weights.masked_fill(later, -torch.inf)
    return weights.softmax(-1) @ v


def after(layer, x, attended):
    x = x + attended.transpose(0, 1).flatten(1) @ layer.out.weight.T
    return x + layer.mlp(layer.norms[1](x))


def definition(layer, row):
    """A row (L, dim) window by window, the whole history computed anew for each."""
    outs = []
    for start in range(0, len(row), layer.window):
        c, x = row[:start], row[start : start + layer.window]
        there = list(range(start))
        here = list(range(start, start + len(x)))
        for block in layer.blocks:
            waist, few = c, there
            for i, part in enumerate(block):
                q, k, v = split(part, x, here)
                update = attention(q, k, v, causal=True)
                if start:
                    source = split(part, c if i == 0 else waist, there if i == 0 else few)
                    update = update + attention(q, *source[1:])
                    if i == 0:
                        entry = source[0]
                        few = there[-layer.history :]
                        read = attention(entry[:, -layer.history :], *source[1:])
                        waist = after(part, c[-layer.history :], read)
                    elif i == len(block) - 1:
                        c = after(part, c, attention(entry, *source[1:]))
                    else:
                        waist = after(part, waist, attention(*source))
                x = after(part, x, update)
        outs.append(x)
    return torch.cat(outs)


@pytest.mark.parametrize("history", [1, 3, 50])
@pytest.mark.parametrize("block_layers", [2, 4])
def test_is_its_definition(history, block_layers):
    layer, x = build(history=history, block_layers=block_layers), tokens(15)
    with torch.no_grad():
        want = torch.stack([definition(layer, row) for row in x])
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_the_first_window_is_a_transformer():
    layer, x = build(window=20), tokens(15)
    with torch.no_grad():
        y = x
        for part in (part for block in layer.blocks for part in block):
            q, k, v = (
                z.unflatten(-1, (4, 8)).transpose(1, 2)
                for z in (part.norms[0](y) @ part.qkv.weight.T).split(32, -1)
            )
            at = torch.arange(15)
            out = ops.attend(rotated(q, at), rotated(k, at), v, causal=True)
            y = y + out.transpose(1, 2).flatten(2) @ part.out.weight.T
            y = y + part.mlp(part.norms[1](y))
        torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-4)


def test_no_token_sees_a_later_one_at_any_place_of_its_window():
    layer, x = build(), tokens(15)
    with torch.no_grad():
        want = layer(x)
        for t in (1, 4, 6, 11):
            other = x.clone()
            other[:, t:] = -3 * x[:, t:]
            got = layer(other)
            torch.testing.assert_close(got[:, :t], want[:, :t], atol=1e-5, rtol=1e-4)


def test_every_token_of_the_history_is_read():
    layer, x = build(), tokens(15).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0, 13].sum(), x)
    assert (grad[0, :14].abs().amax(1) > 0).all() and (grad[0, 14:] == 0).all()


@pytest.mark.parametrize("length", [4, 14, 17])
def test_keeps_all_keys_in_one_layer_of_a_block_and_few_in_the_others(length):
    layer, x = build(), tokens(length)
    with torch.no_grad():
        _, state = layer(x[:, :3], return_state=True)
        for t in range(3, length):
            _, state = layer.step(x[:, t], state)
    begun = (length - 1) // 4 * 4
    kept = [begun, min(3, begun), min(3, begun)] * 2 if begun else []
    assert [part.keys.shape[2] for part in state.history] == kept
    assert [part.keys.shape[2] for part in state.window] == [length - begun] * 6
    torch.testing.assert_close(state.x, x)


def test_rows_at_different_places_in_their_windows_go_on_as_alone():
    layer, x = build(), tokens(20)
    check_rows_go_on_as_alone(layer, x, 7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_layers": 1}, "block_layers must be at least 2, got 1"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"history": 0}, "history must be at least 1"),
        ({"heads": 5}, "multiple of heads, got 5"),
        ({"dim": 36}, "even width, got 9"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
