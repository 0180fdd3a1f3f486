import pytest
import torch
from torch.nn.functional import normalize, silu

import foveate
from foveate.nn.linear.titans import Titans
from layer_checks import check_rows_go_on_as_alone, tokens
from memory_checks import loop, said

FORMS = ("lmm", "mac", "mag", "mal")
SMALL = {"dim": 32, "heads": 4, "chunk": 4, "window": 5, "persistent": 3}


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("titans", **SMALL | options)


def convolved(conv, x):
    seen = torch.cat((torch.zeros(x.shape[0], 3, x.shape[2]), x), 1)
    return silu(sum(seen[:, i : i + x.shape[1]] * conv.weight[:, i] for i in range(4)))


def heads(x):
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def remembered(layer, x, read):
    """What the memory gives at every token of x, and its weights after the last, by the loop."""
    memory = layer.memory
    q, k, v = (heads(y) for y in convolved(memory.convs, x @ memory.qkv.weight.T).chunk(3, -1))
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    gates = torch.sigmoid(memory.gates(x)).mT
    rate, momentum, forget = gates.chunk(3, 1)
    out, ends = loop(q, k, v, memory.weights, rate / 4, momentum, 1 - forget, 4, read)
    return out, ends


def attended(layer, x, seen, source=None):
    """Softmax attention of x to a source under a full map."""
    w = layer.qkv.weight.split(32)
    source = x if source is None else source
    q, k, v = (heads(y @ part.T) for y, part in zip((x, source, source), w, strict=True))
    return (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def gated(layer, out, recalled):
    y = layer.norms[0](joined(out)) * torch.sigmoid(layer.norms[1](joined(recalled)))
    return heads(y)


def near(length, window, always):
    at = torch.arange(length)
    far = at[:, None] - at
    return (far >= 0) & ((far < window) | (at < always))


@pytest.mark.parametrize("read", ["lag", "token"])
@pytest.mark.parametrize("depth", [1, 2])
def test_memory_alone_is_its_definition(depth, read):
    layer, x = build(form="lmm", depth=depth, read=read), tokens(11)
    with torch.no_grad():
        got = layer(x)
    want = layer.readout(remembered(layer, x, read)[0], x)
    torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["mag", "mal"])
def test_memory_beside_and_before_a_window_is_its_definition(form):
    layer, x = build(form=form, read="lag"), tokens(11)
    with torch.no_grad():
        got = layer(x)
    x = torch.cat((layer.persistent.expand(2, -1, -1), x), 1)
    recalled, _ = remembered(layer, x, "lag")
    seen = near(14, 5, 3)
    if form == "mag":
        out = gated(layer, attended(layer, x, seen), recalled)
    else:
        out = attended(layer, joined(recalled), seen)
    want = layer.readout(out, x)[:, 3:]
    torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("read", ["lag", "token"])
def test_memory_as_context_is_its_definition(read):
    layer, x = build(form="mac", read=read), tokens(11)
    with torch.no_grad():
        got = layer(x)
    asked = normalize(heads(convolved(layer.ask_conv, x @ layer.ask.weight.T)), dim=-1)
    ys, outs = [], []
    for start in range(0, 11, 4):
        part = slice(start, start + 4)
        here, n = x[:, part], x[:, part].shape[1]
        # What was written before this segment: the memory after all earlier results.
        recalled = torch.zeros(2, 4, n, 8)
        ends = remembered(layer, torch.cat(ys, 1), read)[1] if ys else None
        for b in range(2):
            for h in range(4):
                now = [w[h] for w in layer.memory.weights] if ends is None else ends[b * 4 + h][0]
                recalled[b, h] = said(asked[b, h, part], now)
        source = torch.cat((layer.persistent.expand(2, -1, -1), joined(recalled), here), 1)
        own = torch.ones(n, n, dtype=torch.bool).tril()
        seen = torch.cat((torch.ones(n, 3, dtype=torch.bool), own, own), 1)
        out = attended(layer, here, seen, source)
        ys.append(joined(out))
        outs.append(out)
    read_back, _ = remembered(layer, torch.cat(ys, 1), read)
    want = layer.readout(gated(layer, torch.cat(outs, 2), read_back), x)
    torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("read", ["lag", "token"])
@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_a_later_one(form, read):
    layer, x = build(form=form, read=read), tokens(14)
    with torch.no_grad():
        want = layer(x)
        for t in (1, 4, 6, 11):
            other = x.clone()
            other[:, t:] = -3 * x[:, t:].flip(1)
            got = layer(other)
            torch.testing.assert_close(got[:, :t], want[:, :t], atol=1e-6, rtol=1e-5)
            assert (got[:, t:] - want[:, t:]).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_rows_at_different_places_in_their_chunks_go_on_as_alone(form):
    layer, x = build(form=form, theta=100.0), tokens(20)
    check_rows_go_on_as_alone(layer, x, 3)


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_learns(form):
    layer = build(form=form)
    layer(tokens(14)).square().mean().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_the_memory_reaches_beyond_the_window():
    layer, x = build(form="mag"), tokens(30)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[:, -1].sum(), x)
    assert grad[:, 0].abs().max() > 0
    with torch.no_grad():
        _, state = layer(x, return_state=True)
    assert state.held.keys.shape[2] == 3 + 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"persistent": -1}, "persistent must be at least 0, got -1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"heads": 5}, "multiple of heads, got 5"),
        ({"dim": 36, "theta": 1.0}, "even width, got 9"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_refuses_an_unknown_form():
    with pytest.raises(ValueError, match="form must be one of lmm, mac, mag, mal, got 'mam'"):
        Titans(32, 4, form="mam")
