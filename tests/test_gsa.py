import pytest
import torch

import foveate
from layer_checks import heads_of, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    options = {"dim": 32, "heads": 4, "kv_heads": 2, "slots": 6} | options
    return foveate.create("gsa", **options)


def read(layer, x):
    """What the slots give, (B, H, L, 8), in float64."""
    return layer.attend(x, None, layer._start(x, None))[0].double()


def projected(layer, x):
    """q, k, v with k and v for each query head, in float64."""
    q, k, v = (heads_of(part, x, 8).double() for part in (layer.q, layer.k, layer.v))
    q, k, v = (y * y.sigmoid() for y in (q, k, v))
    group = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_equals_the_definition_token_by_token(kv_heads):
    layer, x = build(kv_heads=kv_heads, normalizer=2.0), tokens(70)
    with torch.no_grad():
        q, k, v = projected(layer, x)
        keep = heads_of(layer.write, x, 6).double().sigmoid() ** 0.5
        keep = keep.repeat_interleave(4 // kv_heads, 1)
        keys, values = torch.zeros(2, 4, 6, 8).double(), torch.zeros(2, 4, 6, 8).double()
        outs = []
        for t in range(70):
            kept = keep[:, :, t, :, None]
            keys = kept * keys + (1 - kept) * k[:, :, t, None]
            values = kept * values + (1 - kept) * v[:, :, t, None]
            weights = (keys @ q[:, :, t, :, None]).softmax(-2)
            outs.append((weights * values).sum(-2))
        out = torch.stack(outs, 1).flatten(2)
        out = out * out.sigmoid()
        out = out / (out.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        want = layer.readout.out(out.float())
        torch.testing.assert_close(layer(x), want, atol=2e-5, rtol=1e-4)


def test_slots_that_keep_nothing_hold_the_last_token():
    layer, x = build(), tokens(30)
    with torch.no_grad():
        layer.write.forward = lambda y: torch.full((*y.shape[:2], 12), -1e4)
        _, _, v = projected(layer, x)
        torch.testing.assert_close(read(layer, x), v, atol=1e-5, rtol=1e-5)


def test_outputs_are_between_the_values_seen():
    layer, x = build(), 3 * tokens(40)
    with torch.no_grad():
        _, _, v = projected(layer, x)
        out = read(layer, x)
    # Slots start from zeros, which are averaged too.
    assert bool((out <= v.cummax(2).values.clamp(min=0) + 1e-5).all())
    assert bool((out >= v.cummin(2).values.clamp(max=0) - 1e-5).all())


def test_without_gates_a_slot_is_the_softmax_average_of_all_tokens():
    layer, x = build(gated=False), tokens(40)
    with torch.no_grad():
        q, k, v = projected(layer, x)
        logits = heads_of(layer.write, x, 6).double().repeat_interleave(2, 1)
        outs = []
        for t in range(40):
            share = logits[:, :, : t + 1].softmax(2).mT
            weights = ((share @ k[:, :, : t + 1]) @ q[:, :, t, :, None]).softmax(-2)
            outs.append((weights.mT @ (share @ v[:, :, : t + 1]))[:, :, 0])
        out = read(layer, x)
    torch.testing.assert_close(out, torch.stack(outs, 2), atol=1e-5, rtol=1e-4)


def test_one_slot_without_gates_is_a_running_softmax_average():
    layer, x = build(gated=False, slots=1, kv_heads=4), tokens(40)
    with torch.no_grad():
        _, _, v = projected(layer, x)
        weights = heads_of(layer.write, x, 1).double().exp()
        want = (weights * v).cumsum(2) / weights.cumsum(2)
        torch.testing.assert_close(read(layer, x), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gated", [True, False])
def test_goes_on_from_a_state_of_slots(gated):
    layer, x = build(gated=gated), tokens(40)
    with torch.no_grad():
        _, state = layer(x[:, :17], return_state=True)
        rest = layer(x[:, 17:], state=state)
        torch.testing.assert_close(rest, layer(x)[:, 17:], atol=1e-5, rtol=1e-4)
    assert state.s.shape == (2, 2, 8, 6) and state.values.shape == (2, 2, 6, 8)
    assert (state.z is None) == gated


def test_padding_writes_to_no_slot_without_gates():
    layer, x = build(gated=False), tokens(20)
    valid = torch.arange(25) >= 5
    padded = torch.cat((torch.full((2, 5, 32), 9.0), x), 1)
    with torch.no_grad():
        got = layer(padded, mask=foveate.ops.padding(valid))[:, 5:]
        torch.testing.assert_close(got, layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"normalizer": -1.0}, "normalizer must be above 0, got -1"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)
