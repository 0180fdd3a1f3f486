import pytest
import torch

import foveate
from foveate import ops
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("efficient_attn", **{"dim": 32, "heads": 4, "qk_width": 6} | options)


def heads(layer, x, context):
    return (
        part(y).unflatten(-1, (4, -1)).transpose(1, 2)
        for part, y in ((layer.q, x), (layer.k, context), (layer.v, context))
    )


def explicit(layer, x, context, causal, valid=None):
    """Implied weights (B, H, Lq, Lk) row by row, and the output."""
    q, k, v = heads(layer, x, context)
    n, m = q.shape[2], k.shape[2]
    rows = torch.zeros(*q.shape[:3], m, dtype=q.dtype)
    for i in range(n):
        seen = torch.arange(m) <= i + m - n if causal else torch.ones(m, dtype=torch.bool)
        if valid is not None:
            seen = seen & valid
        logits = k.masked_fill(~seen[:, None], -torch.inf)
        rows[:, :, i] = (q[:, :, i].softmax(-1)[:, :, None] * logits.softmax(2)).sum(-1)
    return rows, layer.out((rows @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_implied_weights_which_are_a_distribution(causal, cross):
    layer, x = build().double(), tokens(13).double()
    context = tokens(21, seed=2).double() if cross else x
    with torch.no_grad():
        w, want = explicit(layer, x, context, causal)
        got = layer(x, context=context if cross else None, causal=causal)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)
    assert w.min() >= 0
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))


def test_masked_keys_have_no_share_in_the_softmax_over_positions():
    layer, x = build().double(), tokens(13).double()
    context = tokens(21, seed=2).double()
    valid = torch.arange(21) % 4 != 2
    with torch.no_grad():
        w, want = explicit(layer, x, context, False, valid)
        got = layer(x, context=context, causal=False, mask=ops.padding(valid))
        short = layer(x, context=context[:, valid], causal=False)
    assert w[..., ~valid].abs().max() == 0
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(got, short, atol=1e-9, rtol=1e-7)


def test_tokens_in_another_order_give_the_same_in_that_order():
    layer, x = build().double(), tokens(30).double()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x[:, order], causal=False), layer(x, causal=False)[:, order]
        )


def test_large_logits_and_what_is_added_to_a_channel_of_all_keys_do_no_harm():
    layer, x = build(), tokens(40)
    with torch.no_grad():
        layer.k.weight *= 300
        wide, state = layer(x, return_state=True)
        torch.testing.assert_close(layer.double()(x.double()).float(), wide, atol=1e-3, rtol=1e-3)
    assert torch.isfinite(wide).all() and torch.isfinite(state.z).all()


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of heads, got 5"):
        build(heads=5)
    with pytest.raises(ValueError, match="qk_width must be at least 1, got 0"):
        build(qk_width=0)
    layer, x = build(), tokens(5)
    with pytest.raises(ValueError, match="must not be longer than its context"):
        layer(x, context=x[:, :4], causal=True)
