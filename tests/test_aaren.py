import pytest
import torch

import foveate
from foveate import ops
from layer_checks import heads_of, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("aaren", **{"dim": 32, "heads": 4} | options)


def plain(layer, x, shift=0.0):
    """Masked softmax attention with the constant query, with L×L maps in float64."""
    q = layer.q(layer.query).view(4, 1, 8).double()
    k, v = (heads_of(part, x, 8).double() for part in (layer.k, layer.v))
    scores = (k * q).sum(-1)[:, :, None] / 8**0.5 + shift
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    weights = scores.expand(-1, -1, x.shape[1], -1).masked_fill(later, -torch.inf).softmax(-1)
    return layer.out((weights @ v).transpose(1, 2).flatten(2).float())


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_equals_masked_softmax_with_a_constant_query(size):
    layer, x = build(), tokens(70)
    with torch.no_grad():
        layer.query.mul_(size)
        torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-5, rtol=1e-4)


def test_equals_attention_when_every_token_asks_the_same():
    layer, x = build(), tokens(40)
    with torch.no_grad():
        q = layer.q(layer.query).view(1, 4, 1, 8).expand(2, -1, 40, -1)
        out = ops.attend(q, heads_of(layer.k, x, 8), heads_of(layer.v, x, 8), causal=True)
        want = layer.out(out.transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_a_constant_added_to_all_scores_changes_nothing():
    layer, x = build(), tokens(40)
    scores = layer.scores
    with torch.no_grad():
        want = layer(x)
        layer.scores = lambda y: scores(y) + 500.0
        torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-3)


def test_outputs_are_averages_of_values_seen():
    layer, x = build(), tokens(40)
    with torch.no_grad():
        layer.out.weight.copy_(torch.eye(32))
        v, y = layer.v(x), layer(x)
    assert bool((y <= v.cummax(1).values + 1e-5).all())
    assert bool((y >= v.cummin(1).values - 1e-5).all())


def test_huge_scores_give_numbers():
    layer, x = build(), tokens(60)
    with torch.no_grad():
        layer.query.mul_(1e5)
        y, state = layer(x[:, :30], return_state=True)
        rest = layer(x[:, 30:], state=state)
        assert torch.isfinite(y).all() and torch.isfinite(rest).all()
        torch.testing.assert_close(rest, plain(layer, x)[:, 30:], atol=2e-2, rtol=1e-2)


def test_parts_of_a_sequence_combine_in_any_order():
    """What two parts gave alone merges, by their log-sum-exps, into what the whole gives."""
    layer, x = build(), tokens(60)
    with torch.no_grad():
        states = [layer(y, return_state=True)[1] for y in (*x.split(20, 1), x)]
    a, b, c, whole = ((state.s, state.z) for state in states)
    for parts in ((ops.merge([a, b]), c), (a, ops.merge([b, c])), (c, ops.merge([b, a]))):
        for got, want in zip(ops.merge(parts), whole, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_the_state_is_one_value_and_one_number_a_head():
    _, state = build()(tokens(50), return_state=True)
    assert state.s.shape == (2, 4, 8) and state.z.shape == (2, 4)


def test_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="multiple of heads, got 5 heads"):
        build(heads=5)
