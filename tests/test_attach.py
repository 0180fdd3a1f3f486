"""What attach owes every model: the same results with dense, and the model back as it was."""

import copy

import pytest
import torch
import transformers as hf

import foveate
from attached import generate, left_padded, prompt, step_logits
from foveate import ops
from foveate.attention.base import Attention
from foveate.hf.plan import slots_of
from foveate.native import kernels
from tiny_models import FAMILIES, SIZES, build

BAND = "sink_window:sinks=2,window=6,block=4"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build(request.param)


@pytest.fixture(params=["torch", "native"])
def close(request):
    """A comparison with the plain model's logits; on `torch` both use the same kernel."""
    if request.param == "native" and kernels() is None:
        pytest.skip("the CPU kernels are not in use")
    bound = {"torch": 1e-5, "native": 1e-4}[request.param]
    with ops.backend(request.param):
        yield lambda got, want: torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def plain(model, ids, mask, **options):
    """What the model generates without us."""
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False} | options
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, **inputs).logits


def test_dense_gives_the_logits_of_the_plain_model(model, close):
    ids = prompt(40)
    expected = logits(model, ids)
    with foveate.attach(model):
        close(logits(model, ids), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_dense_gives_the_logits_of_the_plain_model_under_padding(model, side, close):
    ids, mask = left_padded(prompt(40), prompt(27, 1))
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    expected = logits(model, ids, attention_mask=mask, position_ids=position)
    with foveate.attach(model):
        got = logits(model, ids, attention_mask=mask, position_ids=position)
    real = mask.bool()
    close(got[real], expected[real])


def test_dense_generates_the_tokens_of_the_plain_model(model):
    ids, mask = left_padded(prompt(33), prompt(21, 1))
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}):
        torch.manual_seed(7)
        expected = plain(model, ids, mask, **options)
        torch.manual_seed(7)
        with foveate.attach(model):
            assert torch.equal(plain(model, ids, mask, **options), expected)


def test_logits_are_bitwise_the_same_after_exit(model):
    ids, before_config = prompt(40), copy.deepcopy(model.config.to_dict())
    before = logits(model, ids)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    with foveate.attach(model, prefill=BAND, decode=BAND, cache="window:budget=8,sinks=2"):
        acts = model.config.model_type != "mistral"  # every layer has a window of its own
        assert torch.allclose(logits(model, ids), before, atol=1e-4) != acts
        generate_inside = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert generate_inside.shape == (1, 43)
    assert torch.equal(logits(model, ids), before)
    assert model.config.to_dict() == before_config
    after = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    assert after == hooks


def test_a_left_padded_row_gives_the_tokens_of_the_row_alone(model):
    rows = [prompt(30, 1), prompt(17, 2)]
    ids, mask = left_padded(*rows)
    slots = {"prefill": BAND, "decode": BAND}
    together = generate(model, ids, mask, **slots)
    alone = torch.cat([generate(model, row, **slots) for row in rows])
    assert torch.equal(together, alone)


def test_chunked_prefill_equals_one_prefill(model):
    ids = prompt(40)
    for slots in ({}, {"prefill": BAND, "decode": BAND}):
        with foveate.attach(model, **slots):
            whole = logits(model, ids)
            cache = hf.DynamicCache(config=model.config)
            parts = [
                logits(model, ids[:, lo : lo + 11], past_key_values=cache)
                for lo in range(0, 40, 11)
            ]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_an_attached_model(model):
    ids = prompt(24)
    with foveate.attach(model, prefill=BAND):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)
    model.zero_grad()


def test_packed_documents_stay_apart():
    model = build("llama")
    ids = prompt(30)
    position = torch.cat([torch.arange(12), torch.arange(18)])[None]
    expected = logits(model, ids, position_ids=position, use_cache=False)
    with foveate.attach(model):
        got = logits(model, ids, position_ids=position, use_cache=False)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_4d_mask_of_the_callers_is_honoured():
    model, ids = build("llama"), prompt(20)
    seen = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    seen[..., 5:, 2] = False
    expected = logits(model, ids, attention_mask=seen)
    added = torch.zeros(1, 1, 20, 20).masked_fill(~seen, torch.finfo(torch.float32).min)
    with foveate.attach(model):
        for mask in (seen, added):
            got = logits(model, ids, attention_mask=mask)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="bool or hold 0"):
            logits(model, ids, attention_mask=torch.full((1, 1, 20, 20), 0.5))


def test_bfloat16_runs():
    model, ids = build("llama").to(torch.bfloat16), prompt(30)
    expected = logits(model, ids)
    with foveate.attach(model):
        torch.testing.assert_close(logits(model, ids), expected, rtol=0.05, atol=0.5)


def test_plans_may_differ_by_layer_and_by_head():
    model, ids = build("llama"), prompt(30)
    with foveate.attach(model, prefill=BAND) as attached:
        assert {m.card.name for m in attached.prefill} == {"sink_window"}
        everywhere = logits(model, ids)
    plans = [[BAND] * 4, dict.fromkeys(range(4), BAND), [[BAND, BAND]] * 4]
    for plan in plans:
        with foveate.attach(model, prefill=plan):
            torch.testing.assert_close(logits(model, ids), everywhere, rtol=1e-5, atol=1e-5)
    with foveate.attach(model, prefill={1: [BAND, None]}):
        mixed = logits(model, ids)
    assert not torch.allclose(mixed, everywhere) and not torch.allclose(mixed, logits(model, ids))


def test_layers_can_keep_different_amounts():
    model = build("llama")
    ids, mask = left_padded(prompt(30, 1), prompt(12, 2))
    slots = {"cache": {0: "window:budget=8,sinks=2", 2: "window:budget=16,sinks=2"}}
    together = generate(model, ids, mask, **slots)
    alone = [generate(model, r, **slots) for r in (prompt(30, 1), prompt(12, 2))]
    assert torch.equal(together, torch.cat(alone))


def test_a_cache_filled_before_attach_is_taken_over():
    model, ids = build("llama"), prompt(30)
    whole = step_logits(model, ids, 20)
    cache = hf.DynamicCache()
    logits(model, ids[:, :20], past_key_values=cache)
    with foveate.attach(model), torch.no_grad():
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 30)]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, 1:], rtol=1e-5, atol=1e-5)


def test_prompt_lookup_decoding_works_with_a_full_cache():
    model, ids = build("llama"), prompt(8).repeat(1, 4)
    options = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 3}
    expected = model.generate(ids, **options)
    with foveate.attach(model):
        assert torch.equal(model.generate(ids, **options), expected)
    with (
        foveate.attach(model, cache="window:budget=8,sinks=2"),
        pytest.raises(ValueError, match="cannot give back"),
    ):
        model.generate(ids, **options)


def test_nested_use_is_refused_and_leaves_the_outer_one_alone():
    model, ids = build("llama"), prompt(20)
    with foveate.attach(model, prefill=BAND):
        inside = logits(model, ids)
        with pytest.raises(RuntimeError, match="already attached"):
            foveate.attach(model)
        assert torch.equal(logits(model, ids), inside)


def test_detach_works_without_a_with_block_and_twice():
    model, ids = build("llama"), prompt(20)
    before = logits(model, ids)
    attached = foveate.attach(model, prefill=BAND)
    assert not torch.equal(logits(model, ids), before)
    attached.detach()
    attached.detach()
    assert torch.equal(logits(model, ids), before)


def test_an_error_inside_the_block_still_detaches():
    model, ids = build("llama"), prompt(20)
    before = logits(model, ids)
    with pytest.raises(KeyError), foveate.attach(model, prefill=BAND):
        raise KeyError
    assert torch.equal(logits(model, ids), before)


def test_a_model_outside_the_attention_interface_is_refused():
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(TypeError, match="attention interface"):
        foveate.attach(bloom)
    with pytest.raises(TypeError, match="transformers model"):
        foveate.attach(torch.nn.Linear(2, 2))
    t5 = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(TypeError, match="encoder-decoder"):
        foveate.attach(t5)


def test_a_model_that_shares_its_config_is_not_touched_silently():
    config = hf.LlamaConfig(**SIZES)
    one, two = hf.LlamaForCausalLM(config).eval(), hf.LlamaForCausalLM(config).eval()
    with foveate.attach(one), pytest.raises(RuntimeError, match="shares its config"):
        logits(two, prompt(5))


@pytest.mark.parametrize(
    ("slots", "error", "words"),
    [
        ({"prefill": "tidal"}, ValueError, "cannot fill the slot prefill"),
        ({"decode": "flexprefill"}, ValueError, "cannot fill the slot decode"),
        ({"prefill": "snapkv"}, TypeError, "kind attention"),
        ({"cache": "dense"}, TypeError, "kind cache"),
        ({"prefill": 3}, TypeError, "kind attention"),
        ({"prefill": ["dense"]}, ValueError, "4 layers"),
        ({"decode": {1: ["tidal", None]}}, ValueError, "cannot serve heads"),
        ({"prefill": {9: "dense"}}, ValueError, "no layer 9"),
        ({"prefill": "flexprefil"}, ValueError, "did you mean 'flexprefill'"),
        ({"decode": "recycled", "cache": "window"}, ValueError, "choose another pair"),
    ],
)
def test_wrong_slots_are_refused_before_the_model_is_touched(slots, error, words):
    model = build("llama")
    with pytest.raises(error, match=words):
        foveate.attach(model, **slots)
    assert model.config._attn_implementation == "sdpa"
    with foveate.attach(model):
        pass


def test_a_static_cache_is_refused():
    model, ids = build("llama"), prompt(8)
    with foveate.attach(model), pytest.raises(ValueError, match="DynamicCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_attention_dropout_is_refused():
    config = hf.LlamaConfig(**SIZES, attention_dropout=0.5)
    model = hf.LlamaForCausalLM(config).train()
    with foveate.attach(model), pytest.raises(ValueError, match="dropout"):
        model(prompt(8))


def test_an_encoded_cache_is_refused_outside_the_block():
    model, ids = build("llama"), prompt(20)
    cache = hf.DynamicCache()
    with foveate.attach(model, cache="rotate_kv"):
        logits(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="needs the model to be attached"):
        logits(model, ids[:, :1], past_key_values=cache)


def test_specs_find_their_slots():
    assert slots_of("tidal") == {"decode": "tidal"}
    assert slots_of("snapkv:budget=9") == {"cache": "snapkv:budget=9"}
    assert slots_of("prefill=hip + cache=window") == {"prefill": "hip", "cache": "window"}
    assert slots_of("sink_window") == {"prefill": "sink_window", "decode": "sink_window"}
    with pytest.raises(ValueError, match="twice"):
        slots_of("tidal+decode=recycled")


def test_mechanisms_act_inside_the_model(builtin):
    model, tokenizer = builtin
    ids = tokenizer("The capital of France is Paris and that of Italy is", return_tensors="pt")
    seen = []
    with foveate.attach(model, prefill=BAND) as attached:
        attached.record = seen.append
        model(**ids)
    assert len(seen) == model.config.num_hidden_layers
    assert all(isinstance(m, Attention) for m in attached.prefill)
    assert all(0 < r.retained_mass < 1 for r in seen)


def test_generation_on_the_built_in_model_is_unchanged_by_dense(builtin):
    model, tokenizer = builtin
    tokenizer.padding_side = "left"
    batch = tokenizer(
        ["The capital of France is", "Once upon a time there was a small dog that"],
        return_tensors="pt",
        padding=True,
    )
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**batch, **options)
    with foveate.attach(model):
        assert torch.equal(model.generate(**batch, **options), expected)
