import pytest
import torch

import foveate
from foveate import ops
from layer_checks import tokens


def build(**options):
    torch.manual_seed(0)
    return foveate.create("softmax_attention", **{"dim": 32, "heads": 4} | options).eval()


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 5, 40])
def test_a_window_keeps_only_what_the_next_token_sees(window):
    layer, x = build(window=window, theta=100.0), tokens(30)
    want = layer(x)
    open_layer = build(theta=100.0)
    near = ops.window(window)
    torch.testing.assert_close(want, open_layer(x, mask=near), atol=1e-6, rtol=1e-5)
    for cut in (1, 4, 17):
        y, state = layer(x[:, :cut], return_state=True)
        outs = [y]
        for t in range(cut, 30):
            assert state.keys.shape[2] == min(window - 1, t) and state.pos == t
            assert state.keys.untyped_storage().nbytes() == state.keys.nbytes
            y, state = layer.step(x[:, t], state)
            outs.append(y[:, None])
        torch.testing.assert_close(torch.cat(outs, 1), want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_padding_is_counted_from_the_first_token_also_where_keys_were_dropped():
    layer, x = build(window=6), tokens(24)
    valid = torch.arange(24) >= torch.tensor([0, 9])[:, None]
    want = layer(x, mask=ops.padding(valid))
    y, state = layer(x[:, :20], mask=ops.padding(valid[:, :20]), return_state=True)
    z, _ = layer(x[:, 20:], mask=ops.padding(valid), state=state, return_state=True)
    torch.testing.assert_close(torch.cat((y, z), 1)[0], want[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat((y, z), 1)[1, 9:], want[1, 9:], atol=1e-6, rtol=1e-5)
    alone = layer(x[1:, 9:])
    torch.testing.assert_close(want[1:, 9:], alone, atol=1e-6, rtol=1e-5)


def test_a_shifted_mask_is_the_mask_further_on():
    mask = ops.padding(torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.5)
    at = torch.arange(20)
    got = (mask & ops.window(4)).shifted(30)
    want = (mask & ops.window(4)).to_dense(20, 20, q_pos=at + 30, k_pos=at + 30)
    assert torch.equal(got.to_dense(20, 20, q_pos=at, k_pos=at), want)
    layout = ops.from_mask(got, 20, 20, 4).to_bool()
    assert (
        layout.view(*layout.shape[:2], 5, 5)
        | ~want.unflatten(2, (5, 4)).unflatten(4, (5, 4)).any(5).any(3)
    ).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"window": 0}, "window must be at least 1"),
        ({"heads": 5}, "dim must be a multiple of heads"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
