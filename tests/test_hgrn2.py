import pytest
import torch

import foveate
from layer_checks import heads_of, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("hgrn2", **{"dim": 32, "heads": 4, "index": 1, "layers": 3} | options)


def gates(layer, x):
    """f (B, H, L, K) in float64, with the bounds that a softmax of equal numbers gives."""
    lowest = layer.bound.index / 3
    keep = lowest + (1 - lowest) * layer.forget(x).double().sigmoid()
    return keep.unflatten(-1, (4, 8)).transpose(1, 2)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_equals_the_definition_token_by_token(index):
    layer, x = build(index=index), tokens(70)
    with torch.no_grad():
        q, v = (heads_of(part, x, 8).double() for part in (layer.q, layer.v))
        q, keep = q * q.sigmoid(), gates(layer, x)
        state, outs = torch.zeros(2, 4, 8, 8).double(), []
        for t in range(70):
            kept = keep[:, :, t, :, None]
            state = kept * state + (1 - kept) * v[:, :, t, None]
            outs.append((state * q[:, :, t, :, None]).sum(2) / 8**0.5)
        out = torch.stack(outs, 1).flatten(2)
        out = out / (out.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        want = layer.readout.out(out.float())
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_rows_of_the_state_are_averages_of_values():
    layer, x = build(), 5 * tokens(60)
    with torch.no_grad():
        _, state = layer(x, return_state=True)
        largest = heads_of(layer.v, x, 8).abs().amax(2)[:, :, None]
    assert bool((state.s.abs() <= largest * (1 + 1e-5)).all())


def test_a_gate_that_keeps_all_writes_nothing():
    layer, x = build(index=0), tokens(40)
    with torch.no_grad():
        _, state = layer(x[:, :20], return_state=True)
        layer.bound.forward = lambda y: torch.zeros_like(y)
        _, after = layer(x[:, 20:], state=state, return_state=True)
    assert torch.equal(after.s, state.s)


def test_almost_open_gates_still_write():
    layer, x = build(index=0), tokens(1)
    layer.bound.forward = lambda y: torch.full_like(y, -1e-12)
    with torch.no_grad():
        _, state = layer(x, return_state=True)
        want = 1e-12 * heads_of(layer.v, x, 8).expand(2, 4, 8, 8)
    torch.testing.assert_close(state.s, want, atol=0.0, rtol=1e-5)


def test_fewer_heads_have_larger_states_and_no_more_parameters():
    small, large = build(heads=4), build(heads=1)
    held = [layer(tokens(5), return_state=True)[1].s[0].numel() for layer in (small, large)]
    assert held == [4 * 8 * 8, 32 * 32]
    counts = [sum(p.numel() for p in layer.parameters()) for layer in (small, large)]
    assert counts[0] == counts[1]


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="multiple of heads, got 5 heads"):
        build(heads=5)
    with pytest.raises(ValueError, match="index must be in"):
        build(index=-1)
