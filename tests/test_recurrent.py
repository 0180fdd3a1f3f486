from dataclasses import replace

import pytest
import torch

import foveate
from foveate import ops
from foveate.nn._linear import decay_rates, head_width, step_bias
from foveate.nn._recurrent import state_bytes
from layer_checks import tokens


def build(name="gated_deltanet", **options):
    torch.manual_seed(0)
    wide = {"expand_k": 1.0, "expand_v": 1.0} if name == "gated_deltanet" else {}
    return foveate.create(name, dim=32, heads=4, **wide, **options).eval()


@torch.no_grad()
def test_hidden_tokens_are_as_if_they_were_not_there():
    layer, x = build(), tokens(20)
    valid = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) < 0.6
    x[~valid] = float("nan")
    y, state = layer(x, mask=ops.padding(valid), return_state=True)
    for row in range(2):
        alone, own = layer(x[row : row + 1, valid[row]], return_state=True)
        torch.testing.assert_close(y[row, valid[row]], alone[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(state.s[row], own.s[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(state.conv[0][row], own.conv[0][0])
    assert state.pos.tolist() == valid.sum(1).tolist() and (y[~valid] == 0).all()


@torch.no_grad()
def test_a_state_has_the_size_that_the_card_says():
    x = tokens(30)
    _, state = build()(x, return_state=True)
    assert state_bytes(state) == 2 * 4 * (4 * 8 * 8 + 3 * 96)
    _, state = build("linattn")(x, return_state=True)
    assert state_bytes(state) == 2 * 4 * (4 * 8 * 8 + 4 * 8)
    _, longer = build("linattn")(tokens(60), return_state=True)
    assert state_bytes(longer) == state_bytes(state)
    _, cache = build("softmax_attention")(x, return_state=True)
    assert state_bytes((cache, cache)) == 2 * 2 * 2 * 4 * 30 * 32


def test_states_of_others_are_refused():
    layer, x = build(), tokens(5)
    _, state = layer(x, return_state=True)
    _, other = build("linattn")(x, return_state=True)
    with pytest.raises(ValueError, match="gated_deltanet got the state of another layer, linattn"):
        layer(x, state=other)
    with pytest.raises(ValueError, match="another layer, KeyValues"):
        layer(x, state=build("softmax_attention")(x, return_state=True)[1])
    with pytest.raises(ValueError, match="a state of 2 rows for x of 1"):
        layer(x[:1], state=state)
    with pytest.raises(ValueError, match="state must be"):
        layer(x, state=replace(state, s=state.s[:, :, :4]))


def test_calls_that_cannot_be_served_are_refused():
    layer, x = build(), tokens(5)
    for call, said in (
        ({"causal": False}, "does not do noncausal self-attention; it does causal self"),
        ({"context": x}, "does not do causal cross-attention"),
        ({"mask": ops.window(3)}, "can only be masked by ops.padding"),
        ({"mask": ops.padding(torch.ones(3, 5).bool())}, "of 3 rows of 5 tokens, x is of 2 of 5"),
        ({"mask": ops.padding(torch.ones(4).bool())}, "of 1 rows of 4 tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            layer(x, **call)
    for wrong in (x[:, :, :16], x[0], x[:, :0]):
        with pytest.raises(ValueError, match="x must be"):
            layer(wrong)
    with pytest.raises(ValueError, match="causal self-attention only"):
        build("linattn")(x, causal=False, return_state=True)
    with pytest.raises(ValueError, match="must not be longer than its context"):
        build("linattn")(x, context=x[:, :3])


@torch.no_grad()
def test_queries_of_causal_cross_attention_are_at_the_end_of_the_context():
    layer, x = build("linattn"), tokens(12)
    want = layer(x)
    torch.testing.assert_close(layer(x[:, 7:], context=x), want[:, 7:], atol=1e-6, rtol=1e-5)


def test_masks_of_padding_alone_say_what_is_real():
    valid = torch.tensor([[True, True, False], [True, False, False]])
    got = ops.real_tokens(ops.padding(valid), 2, 2)
    assert torch.equal(got, valid[:, 1:])
    assert ops.real_tokens(ops.padding(torch.ones(3).bool()), 2, 3) is None
    assert ops.real_tokens(None, 2, 3) is None


def test_parts_refuse_what_does_not_divide():
    assert head_width(64, 4, 0.75) == 12
    with pytest.raises(ValueError, match=r"dim 32 times 0.75 must be a multiple of heads, got 5"):
        head_width(32, 5, 0.75)


def test_steps_and_rates_start_in_their_ranges():
    torch.manual_seed(0)
    steps = torch.nn.functional.softplus(step_bias(4000).detach())
    assert 0.999e-3 < float(steps.min()) < 2e-3 and 0.09 < float(steps.max()) < 0.1001
    torch.testing.assert_close(steps.log().median(), torch.tensor(0.01).log(), atol=0.15, rtol=0)
    rates = decay_rates(4000, 1.0, 16.0).detach().exp()
    assert 0.999 < float(rates.min()) < 1.2 and 15.5 < float(rates.max()) < 16.001
