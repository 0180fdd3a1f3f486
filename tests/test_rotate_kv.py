import pytest
import torch
from transformers import DynamicCache

import foveate
from attached import (
    check_bytes,
    prompt,
    step_logits,
)
from foveate.hf.text import builtin_text, encode

SMALL = "rotate_kv:bits=4,group=16,sinks=3"


def pair(n=40, heads=3, dim=64, batch=2, seed=0):
    """Keys with outlier channels, and values, (B, Hkv, n, D)."""
    torch.manual_seed(seed)
    k, v = torch.randn(batch, heads, n, dim), torch.randn(batch, heads, n, dim)
    k[..., 5] *= 20
    k[..., dim // 2] += 15
    return k, v


def trip(k, v, valid=None, **options):
    policy, state = foveate.create("rotate_kv", **options), {}
    packed = policy.encode(k, v, valid=valid, state=state)
    return *policy.decode(packed, state=state), packed, state


def error(x, y):
    return float((x - y).norm() / x.norm())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (4, 16), (8, 80), (1, 128)])
def test_keys_and_values_come_back_about_right(bits, heads, dim):
    k, v = pair(heads=heads, dim=dim)
    keys, values, packed, _ = trip(k, v, bits=bits)
    bound = {2: 0.6, 3: 0.25, 4: 0.12, 8: 0.01}[bits]
    assert error(k, keys) < bound
    assert error(v, values) < bound
    assert packed["k"].shape == (2, 40, heads * dim * bits // 8)


def test_at_8_bits_a_rotated_channel_is_within_half_a_step():
    k, v = pair()
    keys = trip(k, v, bits=8, key="none")[0]
    turned, back = (foveate.ops.hadamard(x.transpose(1, 2)) for x in (k, keys))
    tiles = turned.flatten(2).unflatten(2, (-1, 64))
    # The step is stored in 8 significant bits, rounded up.
    bound = (tiles.amax(-1) - tiles.amin(-1)) / 510 * (1 + 2**-7) + 1e-4
    away = (turned - back).abs().flatten(2).unflatten(2, (-1, 64)).amax(-1)
    assert bool((away <= bound).all())


def test_each_step_makes_keys_with_outliers_more_exact():
    k, v = pair(n=200)
    plain = error(k, trip(k, v, bits=4, rotate=False, key="none")[0])
    rotated = error(k, trip(k, v, bits=4, key="none")[0])
    ordered = error(k, trip(k, v, bits=4)[0])
    assert ordered < rotated < plain


def test_channels_are_ordered_by_their_sum_over_real_tokens_only():
    k, v = pair(n=30, batch=1)
    noise = torch.cat([100 * torch.randn(1, 3, 9, 64), k], 2)
    valid = torch.arange(39)[None] >= 9
    order = trip(noise, noise, valid, bits=4)[3]["order"]
    assert torch.equal(order, trip(k, v, bits=4)[3]["order"])


def test_the_order_is_calibrated_once():
    policy, state = foveate.create("rotate_kv"), {}
    policy.encode(*pair(seed=0), valid=None, state=state)
    before = state["order"].clone()
    policy.encode(*pair(seed=1), valid=None, state=state)
    assert torch.equal(state["order"], before)


def test_a_row_does_not_depend_on_its_batch_mates():
    k, v = pair(batch=2)
    together, alone = trip(k, v, bits=2)[0], trip(k[:1], v[:1], bits=2)[0]
    torch.testing.assert_close(together[:1], alone)


def test_tokens_are_quantised_one_by_one():
    k, v = pair(batch=1)
    policy, state = foveate.create("rotate_kv", bits=2), {}
    whole = policy.encode(k, v, valid=None, state=state)
    one = policy.encode(k[:, :, 7:8], v[:, :, 7:8], valid=None, state=state)
    for name, x in one.items():
        assert torch.equal(x, whole[name][:, 7:8])


@pytest.mark.parametrize(
    ("heads", "dim", "group", "keys", "values"),
    [(3, 64, 128, 3, 1), (8, 128, 128, 8, 1), (4, 64, 128, 2, 1), (3, 64, 32, 6, 2)],
)
def test_the_group_falls_back_to_the_head_dim(heads, dim, group, keys, values):
    packed = trip(*pair(heads=heads, dim=dim), group=group)[2]
    assert packed["k_scale"].shape == (2, 40, keys)
    assert packed["v_scale"].shape == (2, 40, heads, values)


def test_exact_tokens_hold_the_largest_entries_of_real_tokens():
    hidden = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    hidden[0, 3, 1], hidden[0, 3, 2], hidden[0, 7, 0] = 50, -40, -60
    hidden[1, 0], hidden[1, 5, 4] = 99, 9
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :2] = False
    chosen = foveate.create("rotate_kv", sinks=3).exact(hidden, valid)
    assert chosen[0].nonzero().flatten().tolist() == [3, 7]
    assert 5 in chosen[1].nonzero().flatten().tolist()
    assert not chosen[1, :2].any()
    assert foveate.create("rotate_kv", sinks=0).exact(hidden, valid) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits must be one of"),
        ({"key": "sum"}, "key must be signed, abs or none"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"group": 0}, "group must be at least 1"),
        ({"heads": 0}, "heads must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        foveate.create("rotate_kv", **options)


def test_without_the_quantiser_logits_are_the_plain_ones(tiny_llama, monkeypatch):
    """Rotation, order, rotary embedding and exact tokens cancel."""

    def unquantised(x, *_, **__):
        return foveate.ops.Quantized(x, x[..., :0], x[..., :0])

    monkeypatch.setattr(foveate.ops, "quantize", unquantised)
    monkeypatch.setattr(foveate.ops, "dequantize", lambda x, *_, **__: x.codes)
    ids = prompt(40)
    got = step_logits(tiny_llama, ids, 28, cache="rotate_kv:bits=8,sinks=3")
    torch.testing.assert_close(got, step_logits(tiny_llama, ids, 28), rtol=1e-4, atol=1e-4)


def test_keeping_every_token_exact_equals_plain(tiny_llama):
    """The prompt stays as it is where all its tokens count as sinks: only decoded ones differ."""
    ids = prompt(29)
    got = step_logits(tiny_llama, ids, 28, cache="rotate_kv:bits=2,sinks=100000")
    torch.testing.assert_close(got, step_logits(tiny_llama, ids, 28), rtol=1e-5, atol=1e-5)


def test_rows_with_fewer_exact_tokens_keep_theirs(tiny_llama, monkeypatch):
    """The first row keeps its first slot alone; what fills its list up must not undo that."""

    def exact(self, hidden, valid):
        chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        chosen[0, 0] = True
        chosen[1:, -4:] = True
        return chosen

    monkeypatch.setattr(type(foveate.create("rotate_kv")), "exact", exact)
    ids = torch.cat([prompt(29, 1), prompt(29, 2)])
    together = step_logits(tiny_llama, ids, 28, cache="rotate_kv:bits=2")
    alone = step_logits(tiny_llama, ids[:1], 28, cache="rotate_kv:bits=2")
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_held_are_those_claimed_at_every_step(tiny_llama, bits):
    check_bytes(tiny_llama, foveate.create("rotate_kv", bits=bits, sinks=3), prompt_length=30)
    check_bytes(tiny_llama, foveate.create("rotate_kv", bits=bits, sinks=0), prompt_length=30)


def test_four_bits_take_a_sixth_of_the_plain_bytes():
    claim = foveate.create("rotate_kv", bits=4, sinks=0).claimed_bytes
    sizes = {"kv_heads": 8, "dim": 128, "itemsize": 4}
    assert pytest.approx(1000 * 2 * 8 * 128 * 4 / claim(1000, 900, **sizes), rel=0.01) == 32 / 4.25


@pytest.mark.builtin
@torch.no_grad()
def test_each_step_brings_a_real_model_nearer_to_its_dense_self(builtin):
    """At 2 bits: plain rounding, then rotation, the order of channels, and exact sinks."""
    model, tokenizer = builtin
    ids = encode(tokenizer, builtin_text(), 224)

    def logits(**slots):
        store = DynamicCache()
        with foveate.attach(model, **slots):
            model(ids[:, :192], past_key_values=store)
            return model(ids[:, 192:], past_key_values=store).logits.log_softmax(-1)

    dense = logits()
    away = []
    for options in ("rotate=false,key=none,sinks=0", "key=none,sinks=0", "sinks=0", "sinks=20"):
        got = logits(cache=f"rotate_kv:bits=2,{options}")
        away.append(float((dense.exp() * (dense - got)).sum(-1).mean()))
    assert away == sorted(away, reverse=True)
