import pytest
import torch

import foveate
from foveate import ops
from foveate.nn.decode import _kept, nats
from foveate.nn.decode._kept import EMPTY, GLOBAL, LOCAL, SLIDING, kept_for, last_seen, soft_attend
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    options = {"dim": 32, "heads": 4, "kv_heads": 2, "window": 3, "theta": 100.0} | options
    return foveate.create("nats", **options).eval()


def drawn(length, seed=0, batch=2, heads=2, shares=(0.2, 0.4, 0.4)):
    """Types (batch, heads, length), the first Global."""
    made = torch.Generator().manual_seed(seed)
    kinds = torch.multinomial(torch.tensor(shares), batch * heads * length, True, generator=made)
    kinds = kinds.view(batch, heads, length)
    kinds[..., 0] = GLOBAL
    return kinds


def plain_shown(types, window):
    """M (…, n, n) by its definition, with products: types (…, n, 3)."""
    n, rows = types.shape[-2], []
    g, l, s = types.unbind(-1)  # noqa: E741
    for t in range(n):
        row = []
        for i in range(n):
            if i > t:
                row.append(torch.zeros_like(g[..., 0]))
                continue
            between = torch.ones_like(g[..., 0])
            for j in range(i + 1, t):
                between = between * (1 - g[..., j])
            row.append(g[..., i] + l[..., i] * between + s[..., i] * (t - i <= window))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def plain(q, k, v, types, window):
    """Attention by the definition, with L×L maps."""
    group = q.shape[1] // k.shape[1]
    k, v, shown = (x.repeat_interleave(group, 1) for x in (k, v, plain_shown(types, window)))
    weights = shown * (q @ k.mT / q.shape[3] ** 0.5).exp().tril()
    return weights / weights.sum(-1, keepdim=True) @ v


def heads(length, seed=0, dim=8):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, length, dim, generator=made, dtype=torch.float64) for h in (4, 2, 2)]


def test_last_seen_is_the_definition_and_no_token_comes_back():
    kinds = drawn(30)
    shown = plain_shown(torch.nn.functional.one_hot(kinds, 3).double(), 3)
    last = last_seen(kinds, torch.arange(30).expand(kinds.shape), 3)[:, :, None]
    t, i = torch.arange(30)[:, None], torch.arange(30)
    assert torch.equal(shown > 0, (i <= t) & (t <= last))
    assert set(shown.unique().tolist()) == {0.0, 1.0}
    assert (shown.diff(dim=2).clamp_min(0).sum((0, 1, 2)) <= 4).all()  # each appears once a row


@pytest.mark.parametrize("rows", [7, 128])
def test_trained_attention_and_its_gradients_are_those_of_the_definition(rows, monkeypatch):
    monkeypatch.setattr(_kept, "_ROWS", rows)
    grads = []
    for function in (soft_attend, plain):
        types = torch.nn.functional.one_hot(drawn(24), 3).double().requires_grad_()
        inputs = [x.requires_grad_() for x in heads(24)]
        out = function(*inputs, types, 3)
        grads.append(
            (out, *torch.autograd.grad((out * out.detach().sin()).sum(), [*inputs, types]))
        )
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)
    assert all(float(x.detach().abs().sum()) > 0 for x in grads[0])


def test_gradients_of_fractional_types_are_right():
    types = torch.rand(1, 1, 6, 3, dtype=torch.float64, requires_grad=True)
    q, k, v = (x[:1, :1] for x in heads(6))
    assert torch.autograd.gradcheck(lambda x: soft_attend(q, k, v, x, 2), types)


def test_a_global_token_closes_the_local_ones_before_it():
    """The closed form: -(sum over Local i since the last Global, rows up to the next) of dM."""
    kinds = drawn(20, batch=1, heads=1)[0, 0]
    types = torch.nn.functional.one_hot(kinds, 3).double().requires_grad_()
    weight = torch.randn(20, 20, dtype=torch.float64)
    (grad,) = torch.autograd.grad((plain_shown(types, 3) * weight).sum(), types)
    for j in range(20):
        before = [i for i in range(j) if kinds[i] == GLOBAL]
        after = [i for i in range(j + 1, 20) if kinds[i] == GLOBAL]
        first, last = (before[-1] if before else -1), (after[0] if after else 19)
        own = weight[j:, j].sum()
        for i in range(first + 1, j):
            if kinds[i] == LOCAL:
                own = own - weight[j + 1 : last + 1, i].sum()
        torch.testing.assert_close(grad[j, GLOBAL], own)


def fixed(layer, kinds):
    """The layer with types of its own choice for every token, in order of the calls."""
    given = torch.nn.functional.one_hot(kinds, 3).float()
    seen = 0

    def types(x, first=True, mask=None):
        nonlocal seen
        seen = 0 if first else seen
        seen += x.shape[1]
        return given[:, :, seen - x.shape[1] : seen]

    layer.types = types
    return layer


@pytest.mark.parametrize(
    ("kind", "mask"), [(GLOBAL, None), (SLIDING, ops.window(4) | ops.sinks(1))]
)
def test_all_of_one_type_are_dense_attention_or_a_window_and_the_first(kind, mask):
    kinds = torch.full((2, 2, 40), kind)
    kinds[..., 0] = GLOBAL
    layer, x = fixed(build(), kinds), tokens(40)
    q, k, v = layer.split(x, x)
    want = ops.attend(layer._turned(q, 0), layer._turned(k, 0), v, causal=True, mask=mask)
    want = layer.out(want.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cuts", [(1,) * 40, (25, *(1,) * 15), (7, 10, 23), (40,)])
def test_steps_and_chunks_over_the_dropping_cache_equal_the_whole(cuts, seed, monkeypatch):
    monkeypatch.setattr(nats, "_BLOCK", 8)
    x, kinds, state, outs = tokens(40), drawn(40, seed), None, []
    layer = fixed(build(), kinds)
    types = torch.nn.functional.one_hot(kinds, 3).double()
    with torch.no_grad():
        for part in x.split(cuts, 1):
            y, state = layer(part, state=state, return_state=True)
            outs.append(y)
        q, k, v = layer.split(x, x)
        q, k = layer._turned(q, 0), layer._turned(k, 0)
        want = plain(q.double(), k.double(), v.double(), types, 3).float()
        want = layer.out(want.transpose(1, 2).flatten(2))
    torch.testing.assert_close(torch.cat(outs, 1), want, atol=1e-5, rtol=1e-4)
    last = last_seen(kinds, torch.arange(40).expand(kinds.shape), 3)
    assert torch.equal(state.kept, (last >= 40).sum(-1))
    assert state.keys.shape[2] == int(state.kept.max()) < 30


def test_a_local_token_is_seen_by_the_global_one_that_ends_it():
    kinds = torch.tensor([GLOBAL, LOCAL, SLIDING, SLIDING, SLIDING, SLIDING, GLOBAL, SLIDING])
    last = last_seen(kinds, torch.arange(8), 2)
    assert last[1:6].tolist() == [6, 4, 5, 6, 7]
    assert last[0] == last[6] > 8 and last_seen(torch.tensor([EMPTY]), torch.tensor([3]), 2) == -1


def test_a_mask_joins_the_types_also_over_a_cache():
    layer, x = build(), tokens(40)
    mask = ops.documents(torch.arange(40) // 25)
    with torch.no_grad():
        whole = layer(x, mask=mask)
        y, state = layer(x[:, :30], mask=mask, return_state=True)
        late = layer(x[:, 30:], mask=mask, state=state)
        moved = float((whole - layer(x)).abs().max())
    torch.testing.assert_close(torch.cat((y, late), 1), whole, atol=1e-5, rtol=1e-4)
    assert moved > 1e-3


def test_first_and_in_training_last_tokens_are_global():
    layer, x = build(), tokens(20)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[SLIDING::3] = x[0].mean(0)
        for training in (False, True):
            types = layer.train(training).types(x)
            assert torch.equal(types.sum(-1), torch.ones(2, 2, 20))
            assert (types[:, :, 0, GLOBAL] == 1).all()
        assert (types[:, :, -1, GLOBAL] == 1).all()
        assert (layer.eval().types(x, first=False).argmax(-1)[:, :, 0] != GLOBAL).any()


def test_pressure_is_added_to_the_gradient_at_a_tokens_own_type():
    kinds = torch.tensor([GLOBAL, LOCAL, SLIDING, LOCAL, GLOBAL, LOCAL])
    share = kept_for(torch.nn.functional.one_hot(kinds, 3).double())
    want = torch.zeros(6, 3, dtype=torch.float64)
    want[0, GLOBAL], want[4, GLOBAL] = 6 / 6, 2 / 6
    want[1, LOCAL], want[3, LOCAL], want[5, LOCAL] = 3 / 6, 1 / 6, 1 / 6
    torch.testing.assert_close(share, want)
    grads, x = [], tokens(20)
    for pressure in (0.0, 0.5):
        layer = build(pressure=pressure).train()
        torch.manual_seed(1)
        types = layer.types(x)
        loss = (types * torch.arange(3.0)).sum()
        types.retain_grad()
        (grad,) = torch.autograd.grad(loss, layer.router.weight)
        grads.append((float(loss.detach()), grad))
    assert grads[0][0] == grads[1][0] and not torch.equal(grads[0][1], grads[1][1])


def test_more_pressure_keeps_fewer_tokens():
    kept = []
    for pressure in (0.0, 0.3):
        layer, x = build(pressure=pressure), tokens(30)
        want = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(5))
        optimizer = torch.optim.Adam([layer.router.weight], lr=1e-2)
        torch.manual_seed(2)
        for _ in range(40):
            optimizer.zero_grad()
            (layer.train()(x) - want).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            kept.append(int(layer.eval()(x, return_state=True)[1].kept.sum()))
    assert kept[1] < kept[0]


def test_the_router_alone_can_be_tuned():
    layer, x = build(detach=True).train(), tokens(20).requires_grad_()
    layer.types(x).square().sum().backward()
    assert x.grad is None and float(layer.router.weight.grad.abs().sum()) > 0


def test_training_keeps_no_quadratic_tensor():
    from ops_tools import largest_output

    q, k, v = (x.float() for x in heads(1024, dim=4))
    types = torch.nn.functional.one_hot(drawn(1024), 3).float()
    assert largest_output(lambda: soft_attend(q, k, v, types, 3)) < 2 * 4 * 1024 * 1024 // 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_heads": 3}, "multiple of kv_heads, got 4 and 3"),
        ({"window": 0}, "window must be at least 1"),
        ({"pressure": -1.0}, "pressure must be at least 0"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_refuses_contexts_both_sides_and_a_state_in_training():
    layer, x = build(), tokens(5)
    for given in ({"context": x}, {"causal": False}):
        with pytest.raises(ValueError, match="causal self-attention"):
            layer(x, **given)
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        layer.train()(x, return_state=True)
