import pytest
import torch

import foveate
from attached import (
    check_differs_from_plain,
    check_equals_plain,
    check_padded_row_equals_row_alone,
    check_reorder_commutes,
    generate,
    prompt,
)
from foveate import ops
from foveate.attention.base import Call, Memory


def step(mechanism, layers, n=50, q_heads=4, kv_heads=2, dim=8, seed=0, memory=None, valid=None):
    """One decoding step through `layers` layers: their inputs, their outputs, their records."""
    torch.manual_seed(seed)
    memory = Memory() if memory is None else memory
    inputs, outputs, records = [], [], []
    for layer in range(layers):
        q = torch.randn(1, q_heads, 1, dim)
        k, v = torch.randn(1, kv_heads, n, dim), torch.randn(1, kv_heads, n, dim)
        own = {"valid": valid, "memory": memory, "record": records.append}
        call = Call(layer, layers, "decode", **own)
        inputs.append((q, k, v))
        outputs.append(mechanism(q, k, v, call=call))
    return inputs, outputs, records, memory


def densities(mechanism, layers, **options):
    return [r.density for r in step(mechanism, layers, **options)[2]]


def test_a_full_budget_equals_dense():
    inputs, outputs, *_ = step(foveate.create("tidal", budget=50), 6)
    for qkv, out in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(out, ops.attend(*qkv))


def test_the_first_layers_and_the_choosing_ones_are_dense():
    mechanism = foveate.create("tidal", budget=10, select_layer=2, correct_layer=5)
    inputs, outputs, records, _ = step(mechanism, 8)
    for layer, (qkv, out) in enumerate(zip(inputs, outputs, strict=True)):
        assert torch.allclose(out, ops.attend(*qkv), atol=1e-5) == (layer in (0, 1, 2, 5))
    assert [round(r.density, 3) for r in records] == [1, 1, 1, 0.2, 0.2, 1, 0.2, 0.2]


def test_sparse_layers_read_the_top_tokens_of_the_nearest_choice():
    mechanism = foveate.create("tidal", budget=10, select_layer=1, correct_layer=3, always_last=0)
    inputs, outputs, *_ = step(mechanism, 6)
    for layer, source in ((2, 1), (4, 3), (5, 3)):
        q, k, _ = inputs[source]
        best = (q @ k.repeat_interleave(2, 1).mT)[:, :, 0].topk(10).indices
        expected = ops.gather(*inputs[layer], best[:, :, None])
        torch.testing.assert_close(outputs[layer], expected)


def test_scope_kv_shares_one_list_between_the_heads_of_a_kv_head():
    mechanism = foveate.create(
        "tidal", budget=10, select_layer=0, correct_layer=0, scope="kv", always_last=0
    )
    inputs, outputs, *_ = step(mechanism, 2)
    q, k, _ = inputs[0]
    logits = (q @ k.repeat_interleave(2, 1).mT)[:, :, 0]
    best = logits.unflatten(1, (2, 2)).amax(2).topk(10).indices
    torch.testing.assert_close(outputs[1], ops.gather(*inputs[1], best[:, :, None]))


@pytest.mark.parametrize("always_last", [1, 3])
def test_the_newest_tokens_are_among_the_budget(always_last):
    mechanism = foveate.create("tidal", budget=4, select_layer=0, always_last=always_last)
    idx = step(mechanism, 2)[3].rows(0, 1)[0]["idx"]
    assert idx.shape == (1, 4, 4)
    assert idx[..., -always_last:].tolist() == [[list(range(50 - always_last, 50))] * 4]


def test_the_default_correction_lies_at_four_tenths_of_the_depth():
    by_default = densities(foveate.create("tidal", budget=5), 30)
    assert [i for i, d in enumerate(by_default) if d == 1] == [0, 1, 2, 12]


def test_a_correction_before_the_choice_adds_none():
    assert densities(foveate.create("tidal", budget=5, correct_layer=0), 5)[3:] == [0.1, 0.1]


def test_a_choice_beyond_the_last_layer_is_dense():
    assert set(densities(foveate.create("tidal", budget=5, select_layer=9), 5)) == {1.0}


def test_a_choice_of_another_step_is_not_read():
    mechanism = foveate.create("tidal", budget=5, select_layer=0, correct_layer=0)
    memory = step(mechanism, 2)[3]
    torch.manual_seed(1)
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 51, 8)
    out = mechanism(q, k, k, call=Call(1, 2, "decode", memory=memory))
    torch.testing.assert_close(out, ops.attend(q, k, k))


def test_without_memory_every_layer_is_dense():
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 50, 8)
    out = foveate.create("tidal", budget=5)(q, k, k, call=Call(4, 6, "decode"))
    torch.testing.assert_close(out, ops.attend(q, k, k))


def test_where_the_choosing_layers_are_dense_layers_the_other_one_serves():
    one = foveate.create("tidal", budget=5, select_layer=1, correct_layer=3, dense_layers=(3,))
    records = step(one, 6)[2]  # a dense layer records nothing
    assert {r.layer: r.density for r in records} == {0: 1, 1: 1, 2: 0.1, 4: 0.1, 5: 0.1}
    both = foveate.create("tidal", budget=5, select_layer=1, correct_layer=3, dense_layers=(1, 3))
    assert set(densities(both, 6)) == {1.0}


def test_padding_is_never_chosen():
    valid = torch.arange(50)[None] >= 30
    mechanism = foveate.create("tidal", budget=10, select_layer=0, correct_layer=0)
    inputs, outputs, *_ = step(mechanism, 2, valid=valid)
    alone = [(q, k[:, :, 30:], v[:, :, 30:]) for q, k, v in inputs]
    q, k, _ = alone[0]
    logits = (q @ k.repeat_interleave(2, 1).mT)[:, :, 0]
    logits[..., -1] = float("inf")
    best = logits.topk(10).indices
    torch.testing.assert_close(outputs[1], ops.gather(*alone[1], best[:, :, None]))


def test_prefill_is_dense():
    q, k = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
    out = foveate.create("tidal", budget=5)(q, k, k, call=Call(4, 6, "prefill"))
    torch.testing.assert_close(out, ops.attend(q, k, k, causal=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be at least 1"),
        ({"select_layer": -1}, "select_layer must be at least 0"),
        ({"correct_layer": -1}, "correct_layer must be at least 0"),
        ({"budget": 4, "always_last": 5}, "always_last must be at least 0 and at most"),
        ({"scope": "row"}, "scope must be head or kv"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        foveate.create("tidal", **options)


SMALL = "tidal:budget=6,select_layer=0,correct_layer=0"


def test_full_budget_equals_plain(tiny_llama):
    check_equals_plain(tiny_llama, decode="tidal:budget=64,select_layer=0,correct_layer=0")


def test_small_budget_differs_from_plain(tiny_llama):
    check_differs_from_plain(tiny_llama, decode=SMALL)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", [None, "snapkv:budget=12,window=4"])
def test_padded_row_equals_row_alone(tiny_llama, beams, cache):
    check_padded_row_equals_row_alone(tiny_llama, beams, decode=SMALL, cache=cache)


def test_reorder_commutes(tiny_llama):
    check_reorder_commutes(tiny_llama, decode=SMALL)


def test_nothing_is_left_for_the_next_generation(tiny_llama):
    first = generate(tiny_llama, prompt(30), decode=SMALL)
    generate(tiny_llama, prompt(25, 9), decode=SMALL)
    assert torch.equal(first, generate(tiny_llama, prompt(30), decode=SMALL))
