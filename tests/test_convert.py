"""Models whose attention layers are others, made from their own weights."""

import pytest
import torch
from transformers import DynamicCache

import foveate
from attached import left_padded, prompt
from foveate.bench import train as training
from foveate.hf.convert import Conversion
from tiny_models import build

EXACT = ["mea", "mea:components=2", "mqa:kv_heads=2"]
FEWER = ["mea:components=1", "mea:components=1,norm=true", "mqa"]


@pytest.fixture
def model():
    return build("llama")


def logits(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def generated(model, ids, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("spec", EXACT)
def test_as_many_heads_as_before_are_exact(model, spec):
    ids = prompt(40)
    want, said = logits(model, ids), generated(model, ids)
    with Conversion.of(spec).apply(model):
        torch.testing.assert_close(logits(model, ids), want, atol=1e-4, rtol=1e-3)
        assert torch.equal(generated(model, ids), said)


@pytest.mark.parametrize("spec", FEWER)
def test_fewer_heads_change_the_model_and_it_is_put_back_bitwise(model, spec):
    ids = prompt(40)
    want, before = logits(model, ids), dict(model.named_modules())
    with Conversion.of(spec).apply(model):
        assert float((logits(model, ids) - want).abs().max()) > 1e-2
    assert torch.equal(logits(model, ids), want)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("spec", [*EXACT[1:], *FEWER])
def test_steps_over_a_cache_of_component_heads_equal_the_whole(model, spec):
    ids, cache = prompt(30), DynamicCache()
    with Conversion.of(spec).apply(model):
        want = logits(model, ids)
        parts = [logits(model, part, cache) for part in ids.split((20, *[1] * 10), 1)]
        heads = cache.layers[0].keys.shape[1]
        whole = logits(model, ids[:, 20:], _cache_of(model, ids[:, :20]))
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(whole, want[:, 20:], atol=1e-4, rtol=1e-3)
    assert heads == (2 if "2" in spec else 1)


def _cache_of(model, ids):
    cache = DynamicCache()
    logits(model, ids, cache)
    return cache


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", ["mea:components=1,norm=true", "mqa"])
def test_a_padded_row_is_the_row_alone(model, spec, implementation):
    model.set_attn_implementation(implementation)
    rows = [prompt(30, 1), prompt(19, 2), prompt(5, 3)]
    with Conversion.of(spec).apply(model):
        together = generated(model, *left_padded(*rows))
        alone = torch.cat([generated(model, row) for row in rows])
    assert torch.equal(together, alone)


def test_training_brings_a_model_nearer_and_its_file_says_the_same(model, tmp_path):
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    conversion = Conversion.of("mea:components=1")
    result = training.train(model, conversion, [ids], steps=30, lr=3e-3)
    assert result.losses[-1] < result.losses[0] / 3
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad
    result.write(tmp_path / "mea")
    with conversion.apply(model) as converted:
        converted.layers.load_state_dict(result.learner.state_dict())
        want = logits(model, ids)
    with training.load_conversion(model, tmp_path / "mea", "mea"):
        assert torch.equal(logits(model, ids), want)


def test_the_command_trains_and_prints_how_to_load(foveate_command, tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    file, sizes = tmp_path / "mqa", ["--tokens=128", "--window=64", "--steps=2"]
    code, out, err = foveate_command("train", "mqa", tiny_model_dir, *sizes, "--out", file)
    assert code == 0, err
    assert f'load_conversion(model, "{file}", "mqa")' in out
    tiny = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with training.load_conversion(tiny, file, "mqa") as converted:
        assert len(converted.layers) == 2
    with pytest.raises(ValueError, match="was trained on a model with 2 layers"):
        training.load_conversion(build("llama"), file, "mqa")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("tidal", TypeError, "tidal is not made from the layers of a trained model"),
        ("nats", TypeError, "nats is not made from"),
        ("mea:dim=64", ValueError, "mea in the place of trained layers takes .*, got dim"),
        ("mqa:heads=4,kv_heads=1", ValueError, "takes kv_heads, got heads"),
        ("mea:components=x", TypeError, "components"),
    ],
)
def test_refuses_what_cannot_take_the_place(spec, error, message):
    with pytest.raises(error, match=message):
        Conversion.of(spec)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("qwen3", "no weights but its projections, got q_norm.weight, k_norm.weight"),
        ("qwen2", "no biases"),
        ("gemma2", "uncapped"),
    ],
)
def test_refuses_models_whose_attention_has_other_parts_and_leaves_them(family, message):
    model = build(family)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        Conversion.of("mqa").apply(model)
    assert dict(model.named_modules()) == before


def test_attached_and_converted_exclude_each_other(model):
    with foveate.attach(model), pytest.raises(RuntimeError, match="is attached"):
        Conversion.of("mqa").apply(model)
    with (
        Conversion.of("mqa").apply(model),
        foveate.attach(model, prefill="moba"),
        pytest.raises(RuntimeError, match="put it back before attaching"),
    ):
        logits(model, prompt(9))
