import copy

import pytest
import torch
from transformers import DynamicCache

import foveate
from attached import generate, left_padded, prompt
from foveate import ops
from foveate.attention.base import Call, Shared
from foveate.bench.audit.cache import model as tiny_model
from tiny_models import build

SYSTEM = prompt(20, 9)
ROWS = [prompt(14, 1), prompt(8, 2), prompt(3, 3)]


def tensors(batch=3, q_len=1, k_len=9, shared=30, dim=8):
    torch.manual_seed(0)
    q = torch.randn(batch, 4, q_len, dim)
    k, v = torch.randn(2, batch, 2, k_len, dim)
    return q, k, v, Shared(*torch.randn(2, 1, 2, shared, dim))


def repeated(x, batch):
    return x.expand(batch, -1, -1, -1)


@pytest.mark.parametrize("q_len", [1, 5, 9])
@pytest.mark.parametrize("shared", [0, 1, 30])
def test_it_equals_dense_attention_with_the_prefix_repeated(q_len, shared):
    q, k, v, held = tensors(q_len=q_len, shared=shared)
    out = foveate.create("relay")(q, k, v, call=Call(shared=held, softcap=3.0), scale=0.5)
    keys, values = (torch.cat((repeated(x, 3), y), 2) for x, y in ((held.k, k), (held.v, v)))
    want = ops.attend(q, keys, values, causal=True, scale=0.5, softcap=3.0)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)


def test_padding_hides_keys_of_a_request_and_never_the_prefix():
    q, k, v, held = tensors(q_len=4)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, :7], valid[2, 6:] = False, False
    poisoned = [x.clone() for x in (q, k, v)]
    for b in (1, 2):
        poisoned[0][b, :, ~valid[b, -4:]] = 1e3
        poisoned[1][b, :, ~valid[b]] = poisoned[2][b, :, ~valid[b]] = 1e3
    out = foveate.create("relay")(*poisoned, call=Call(shared=held, valid=valid))
    for b in range(3):
        real, rows = valid[b], valid[b, -4:]
        keys = torch.cat((held.k, k[b : b + 1, :, real]), 2)
        values = torch.cat((held.v, v[b : b + 1, :, real]), 2)
        want = ops.attend(q[b : b + 1, :, rows], keys, values, causal=True)
        torch.testing.assert_close(out[b : b + 1, :, rows], want, atol=1e-6, rtol=1e-5)
        assert not out[b, :, ~rows].any()


def test_a_mask_concerns_the_tokens_of_the_request():
    q, k, v, held = tensors(q_len=4)
    visible = torch.rand(4, 9) < 0.5
    out = foveate.create("relay")(q, k, v, mask=ops.dense(visible), call=Call(shared=held))
    rule = torch.cat((torch.ones(4, 30, dtype=torch.bool), visible), 1)
    keys, values = (torch.cat((repeated(x, 3), y), 2) for x, y in ((held.k, k), (held.v, v)))
    want = ops.attend(q, keys, values, causal=True, mask=ops.dense(rule))
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)


def test_an_empty_tail_sees_the_prefix_alone_and_nothing_gives_zero():
    q, k, v, held = tensors(k_len=0)
    relay = foveate.create("relay")
    out = relay(q, k, v, causal=False, call=Call(shared=held))
    want = ops.attend(q, repeated(held.k, 3), repeated(held.v, 3))
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)
    none = Shared(held.k[:, :, :0], held.v[:, :, :0])
    assert not relay(q, k, v, causal=False, call=Call(shared=none)).any()


@pytest.mark.parametrize("padded", [False, True])
def test_prefix_and_tails_are_read_in_one_call_each_for_all_rows(monkeypatch, padded):
    q, k, v, held = tensors(batch=3)
    valid = torch.arange(9) >= torch.tensor([[0], [2], [5]])
    seen, attend = [], ops.attend

    def spy(q, k, v, **options):
        seen.append((tuple(q.shape[::2]), k.shape[2]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(ops, "attend", spy)
    call = Call(shared=held, valid=valid if padded else None)
    foveate.create("relay")(q, k, v, call=call)
    assert sorted(seen) == [((1, 3), 30), ((3, 1), 9)]


def behind(ids, system=SYSTEM):
    """Every row of a batch behind the prefix."""
    return torch.cat((system.expand(len(ids), -1), ids), 1)


@pytest.fixture(scope="module")
def held(tiny_llama):
    return foveate.prefix(tiny_llama, SYSTEM)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("slots", [{}, {"prefill": "relay", "decode": "relay"}])
def test_generation_equals_that_of_every_request_behind_the_prefix(tiny_llama, held, beams, slots):
    got = generate(tiny_llama, *left_padded(*ROWS), beams=beams, prefix=held, **slots)
    alone = [generate(tiny_llama, behind(row), beams=beams) for row in ROWS]
    assert torch.equal(got, torch.cat(alone))


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt2"])
def test_other_families_give_the_logits_of_the_whole_text(family):
    model = build(family)
    held = foveate.prefix(model, SYSTEM)
    ids = torch.cat((ROWS[0], prompt(14, 5)))
    with torch.no_grad():
        want = model(behind(ids)).logits[:, 20:]
        with foveate.attach(model, prefix=held):
            got = model(ids).logits
            bare = model(ids, use_cache=False).logits
    for logits in (got, bare):
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def steps(model, ids, mask, held, cuts, cache=None, swap=None):
    """Logits of a left-padded batch fed in pieces that end at `cuts`."""
    cache, lo, outs = DynamicCache() if cache is None else cache, 0, []
    at = (mask.cumsum(1) - 1).clamp_min(0)
    with foveate.attach(model, prefix=held):
        for n, hi in enumerate(cuts):
            if swap is not None and n == 1:
                cache.reorder_cache(swap)
                ids, mask, at = ids[swap], mask[swap], at[swap]
            given = {"attention_mask": mask[:, :hi], "position_ids": at[:, lo:hi]}
            outs.append(model(ids[:, lo:hi], past_key_values=cache, **given).logits)
            lo = hi
    return torch.cat(outs, 1), cache


def test_pieces_of_any_size_equal_the_whole(tiny_llama, held):
    ids, mask = left_padded(*ROWS)
    whole = steps(tiny_llama, ids, mask, held, [14])[0]
    for cuts in ([12, 13, 14], [3, 9, 14]):
        real = mask.bool()
        torch.testing.assert_close(
            steps(tiny_llama, ids, mask, held, cuts)[0][real], whole[real], atol=1e-5, rtol=1e-5
        )


def test_without_position_ids_positions_go_on_from_the_prefix(tiny_llama, held):
    with torch.no_grad(), foveate.attach(tiny_llama, prefix=held):
        first = tiny_llama(ROWS[0][:, :9])
        rest = tiny_llama(ROWS[0][:, 9:], past_key_values=first.past_key_values)
    with torch.no_grad():
        want = tiny_llama(behind(ROWS[0])).logits[:, 20:]
    got = torch.cat((first.logits, rest.logits), 1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_reordering_moves_the_tails_only(tiny_llama, held):
    ids, mask = left_padded(*ROWS)
    plain = steps(tiny_llama, ids, mask, held, [10, 12, 14])[0]
    swap = torch.tensor([2, 0, 1])
    swapped = steps(tiny_llama, ids, mask, held, [10, 12, 14], swap=swap)[0]
    torch.testing.assert_close(swapped[:, 10:], plain[swap, 10:], atol=1e-5, rtol=1e-5)


def test_reset_keeps_the_prefix(tiny_llama, held):
    ids, mask = left_padded(*ROWS)
    fresh, cache = steps(tiny_llama, ids, mask, held, [14])
    cache.reset()
    assert cache.get_seq_length() == 0
    other = torch.ones_like(ROWS[0])
    steps(tiny_llama, ROWS[0], other, held, [14], cache)
    cache.reset()
    assert torch.equal(steps(tiny_llama, ids, mask, held, [14], cache)[0], fresh)


def test_a_copied_cache_goes_on_from_the_same_prefix(tiny_llama, held):
    ids, mask = left_padded(*ROWS)
    cache = steps(tiny_llama, ids, mask, held, [14])[1]
    copied = copy.deepcopy(cache)
    outs = []
    with torch.no_grad(), foveate.attach(tiny_llama, prefix=held):
        for store in (cache, copied):
            outs.append(tiny_llama(ids[:, :1], past_key_values=store).logits)
    assert torch.equal(*outs)
    assert copied.layers[0].shared is held.layers[0]


def test_the_prefix_is_held_once(tiny_llama, held):
    ids = torch.cat([ROWS[0]] * 3)
    cache = steps(tiny_llama, ids, torch.ones_like(ids), held, [14])[1]
    one = 2 * 4 * 2 * 16  # keys and values, float32, two kv heads of 16
    assert held.nbytes() == 2 * 20 * one
    for layer, shared in zip(cache.layers, held.layers, strict=True):
        assert layer.nbytes() == (20 + 3 * 14) * one
        assert layer.shared.k.data_ptr() == shared.k.data_ptr()


def test_afterwards_the_model_is_as_before(tiny_llama, held):
    with torch.no_grad():
        before = tiny_llama(ROWS[0]).logits
        with foveate.attach(tiny_llama, prefix=held):
            tiny_llama(ROWS[0])
        assert torch.equal(tiny_llama(ROWS[0]).logits, before)


class Letters:
    """A tokenizer of one token a letter, with a start token in front."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + [ord(x) for x in text]}


def test_a_string_is_split_by_its_tokenizer(tiny_llama):
    made = foveate.prefix(tiny_llama, "hello", tokenizer=Letters(128))
    want = foveate.prefix(tiny_llama, [1, *map(ord, "hello")])
    assert made.tokens == made.end == 6
    torch.testing.assert_close(made.layers[1].k, want.layers[1].k)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("hello", {}, TypeError, "text is a string: give tokenizer="),
        ("hello", {"tokenizer": Letters(999)}, ValueError, "has 999 tokens, the model knows 128"),
        ([5, 128], {}, ValueError, "text holds token 128, the model knows 128"),
        ([], {}, ValueError, "text must hold at least one token"),
        (torch.zeros(2, 3), {}, ValueError, r"got \(2, 3\)"),
        ([3], {"documents": "abc"}, TypeError, "documents must be a sequence of texts"),
        ([3], {"documents": [[4], []]}, ValueError, "document 1 must hold at least one token"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tiny_llama, text, options, error, message):
    with pytest.raises(error, match=message):
        foveate.prefix(tiny_llama, text, **options)


def test_what_is_no_prefix_is_refused(tiny_llama):
    with pytest.raises(TypeError, match=r"prefix takes what foveate\.prefix made"):
        foveate.attach(tiny_llama, prefix="You are helpful.")


def test_a_prefix_of_another_model_is_refused(tiny_llama, held):
    other = tiny_model.__wrapped__()
    with pytest.raises(ValueError, match="made with another model"):
        foveate.attach(other, prefix=held)
    with torch.no_grad():
        other(ROWS[0])  # and left as it was


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"decode": "tidal"}, "tidal reads the keys of a request only"),
        ({"prefill": "dense"}, "dense reads the keys of a request only"),
        ({"cache": "window"}, "cache=window does not go with a prefix"),
    ],
)
def test_slots_that_do_not_read_a_prefix_are_refused(tiny_llama, held, slots, message):
    with pytest.raises(ValueError, match=message):
        foveate.attach(tiny_llama, prefix=held, **slots)
    foveate.attach(tiny_llama).detach()


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_models_with_sliding_windows_are_refused(family):
    model = build(family)
    with pytest.raises(ValueError, match="sees a window of 9 tokens"):
        foveate.prefix(model, SYSTEM)
    foveate.attach(model).detach()


def test_another_batch_size_than_that_of_the_cache_is_refused(tiny_llama, held):
    ids, mask = left_padded(*ROWS)
    cache = steps(tiny_llama, ids, mask, held, [14])[1]
    with (
        foveate.attach(tiny_llama, prefix=held),
        pytest.raises(ValueError, match="holds 3 requests, but the call brings 2"),
    ):
        tiny_llama(ids[:2, :1], past_key_values=cache)


def test_a_cache_of_tails_serves_its_own_prefix_only(tiny_llama, held):
    ids, mask = left_padded(*ROWS)
    cache = steps(tiny_llama, ids, mask, held, [14])[1]
    with pytest.raises(ValueError, match="use it inside"):
        tiny_llama(ids[:, :1], past_key_values=cache)
    other = foveate.prefix(tiny_llama, SYSTEM)
    for prefix in (None, other):
        with (
            foveate.attach(tiny_llama, prefix=prefix),
            pytest.raises(ValueError, match="followed another prefix, or none"),
        ):
            tiny_llama(ids[:, :1], past_key_values=cache)
    cache.reset()
    steps(tiny_llama, ids, mask, other, [14], cache)
