"""Layers of a model made linear, as a function and from the command line."""

import re
from functools import partial

import pytest
import torch
from transformers import DynamicCache

import foveate
from attached import left_padded, prompt
from foveate.bench import linearize as job
from foveate.bench import train as training
from foveate.hf.convert import Conversion
from foveate.nn.linear.hedgehog import attention_transfer_loss
from layer_checks import heads_of, hidden_and_output
from tiny_models import build

SIZES = ["--tokens=256", "--held-out=64", "--window=32", "--steps=4"]


@pytest.fixture
def run(foveate_command):
    """Call `foveate linearize`."""
    return partial(foveate_command, "linearize")


@pytest.fixture
def model():
    return build("llama")


def hedgehog(*layers):
    return Conversion(foveate.registry.lookup("hedgehog"), {}, layers or None)


def windows(count, length=32, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (count, length), generator=made)


def logits(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def test_notes_are_the_rotated_queries_and_keys_of_the_chosen_layers(tiny_llama):
    ids = torch.cat((prompt(20, 1), prompt(20, 2)))
    notes = job.attending(tiny_llama, [0], ids)
    assert list(notes) == [0] and len(notes[0]) == 2
    theta = tiny_llama.config.rope_parameters["rope_theta"]
    for row, (q, k) in zip(ids, notes[0], strict=True):
        layer, x, _ = hidden_and_output(tiny_llama, row[None])
        with torch.no_grad():
            want = heads_of(layer.q_proj, x, 16, theta), heads_of(layer.k_proj, x, 16, theta)
        torch.testing.assert_close((q, k), want, atol=1e-5, rtol=1e-4)


def test_both_stages_bring_the_model_nearer_and_leave_it_as_it_was(model):
    ids, texts = prompt(40), windows(4)
    want, before = logits(model, ids), {name: p.clone() for name, p in model.named_parameters()}
    heard = []
    result = job.linearize(
        model, hedgehog(1, 2), texts, texts, steps=24, lr=1e-2,
        tune_steps=24, tune_lr=3e-3, progress=lambda *x: heard.append(x),
    )  # fmt: skip
    assert list(result.divergence) == [1, 2]
    for first, last in result.divergence.values():
        assert last < first
    assert list(result.perplexity) == ["model", "untrained", "attention transfer", "fine-tuning"]
    losses = result.training.losses
    assert len(losses) == 24 and sum(losses[-4:]) < 0.8 * sum(losses[:4])  # the same texts
    assert heard[-1][1:] == (24, 24) and any("layer 2" in stage for stage, *_ in heard)
    assert torch.equal(logits(model, ids), want)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad


def test_figures_are_those_of_the_layers_it_gives_back(model):
    test = windows(3, seed=1)
    result = job.linearize(model, hedgehog(0), windows(4), test, steps=10, tune_steps=0)
    layer = result.training.learner["0"]
    notes = job.attending(model, [0], test)[0]
    with torch.no_grad():
        found = [float(attention_transfer_loss(q, k, *layer.features(q, k))) for q, k in notes]
    assert result.divergence[0][1] == pytest.approx(sum(found) / 3, rel=1e-5)
    with hedgehog(0).apply(model) as converted:
        converted.layers.load_state_dict(result.training.learner.state_dict())
        losses = torch.nn.functional.cross_entropy(
            logits(model, test)[:, :-1].flatten(0, 1), test[:, 1:].flatten()
        )
    assert result.perplexity["attention transfer"] == pytest.approx(float(losses.exp()), rel=1e-4)
    assert "fine-tuning" not in result.perplexity


def test_only_the_chosen_layers_are_replaced_and_a_file_says_which(model, tmp_path):
    ids = prompt(40)
    result = job.linearize(model, hedgehog(1, 3), windows(4), windows(2), steps=3, tune_steps=2)
    result.write(tmp_path / "layers")
    old = [block.self_attn for block in model.model.layers]
    with training.load_conversion(model, tmp_path / "layers", "hedgehog") as converted:
        kept = [block.self_attn is was for block, was in zip(model.model.layers, old, strict=True)]
        assert kept == [True, False, True, False] and list(converted.layers) == ["1", "3"]
        got = logits(model, ids)
    with hedgehog(1, 3).apply(model) as converted:
        converted.layers.load_state_dict(result.training.learner.state_dict())
        assert torch.equal(logits(model, ids), got)
    assert [block.self_attn for block in model.model.layers] == old


def test_steps_over_a_cache_equal_the_whole(model):
    ids, cache = prompt(30), DynamicCache()
    with hedgehog(0, 2).apply(model):
        want = logits(model, ids)
        parts = [logits(model, part, cache) for part in ids.split((20, 7, 1, 1, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=1e-3)


def test_a_cache_holds_sums_of_one_size_where_layers_are_linear(model):
    ids, cache, held = prompt(40), DynamicCache(), []
    with hedgehog(0, 2).apply(model):
        for part in ids.split((10, 29, 1), 1):
            logits(model, part, cache)
            held.append([layer.keys.nbytes + layer.values.nbytes for layer in cache.layers])
    assert cache.get_seq_length() == 40
    sums, keys = 2 * 32 * (16 + 1) * 4, 2 * 2 * 16 * 4  # of 2 kv heads of 16; keys of a token
    assert held == [[sums, keys * n, sums, keys * n] for n in (10, 39, 40)]


def test_rows_of_a_cache_change_places_and_it_can_be_used_again(model):
    ids, cache = torch.cat((prompt(20, 1), prompt(20, 2))), DynamicCache()
    with hedgehog(0, 2).apply(model):
        logits(model, ids[:, :15], cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = logits(model, ids[:, 15:].flip(0), cache)
        torch.testing.assert_close(got, logits(model, ids)[:, 15:].flip(0), atol=1e-4, rtol=1e-3)
        with pytest.raises(ValueError, match="cannot take back tokens"):
            cache.crop(-2)
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(logits(model, ids, cache), logits(model, ids))
    with pytest.raises(ValueError, match="filled by a converted model"):
        logits(model, ids, cache)
    kept = DynamicCache()
    logits(model, ids, kept)
    with hedgehog(0).apply(model), pytest.raises(ValueError, match="before the model was conv"):
        logits(model, ids, kept)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padded_row_is_the_row_alone(model, implementation):
    model.set_attn_implementation(implementation)
    rows = [prompt(30, 1), prompt(19, 2), prompt(5, 3)]

    def said(ids, mask):
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]

    with hedgehog().apply(model):
        together = said(*left_padded(*rows))
        alone = torch.cat([said(row, torch.ones_like(row)) for row in rows])
    assert torch.equal(together, alone)


def test_refuses_a_mask_that_no_recurrence_can_honour():
    sliding, ids = build("mistral"), prompt(30)
    with hedgehog().apply(sliding), pytest.raises(ValueError, match="plain causal attention"):
        logits(sliding, ids)


@pytest.mark.parametrize(
    ("text", "layers"), [("all", None), ("3", (3,)), ("3,8-11", (3, 8, 9, 10, 11)), ("5,5", (5,))]
)
def test_layers_as_they_are_typed(text, layers):
    assert job.layers_of(text) == layers


def test_the_command_says_what_came_of_it_and_how_to_load_it(run, tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    file = tmp_path / "layers"
    code, out, err = run(tiny_model_dir, "--layers=1", *SIZES, "--tune-steps=2", "--out", file)
    assert code == 0, err
    assert re.search(r"│ 1 +│ \d\.\d{3} +│ \d\.\d{3} ", out)
    for stage in ("model", "untrained", "attention transfer", "fine-tuning"):
        assert re.search(rf"{stage} +│ \d+\.\d{{3}}", out)
    assert f'load_conversion(model, "{file}", "hedgehog")' in out.replace("\n", "")
    tiny = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with training.load_conversion(tiny, file, "hedgehog") as converted:
        assert list(converted.layers) == ["1"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--layers=x"], "'x' is no layer; give some like 3,8-11, or all"),
        (["--layers=4-3"], "'4-3' is no layer"),
        (["--with=mqa"], "mqa has no feature maps"),
        (["--with=gla"], "gla is not made from the layers of a trained model"),
        (["--tokens=8", "--window=16"], "got 16, 8 and"),
        (["--steps=0"], "want --steps >= 1"),
        (["--out=missing/f"], "directory that exists"),
    ],
)
def test_refuses_before_the_model_is_loaded(run, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*args)
    assert code == 2 and said in err


def test_refuses_layers_that_the_model_does_not_have(model):
    with pytest.raises(ValueError, match="has layers 0 to 3, got 4, 9"):
        hedgehog(1, 4, 9).apply(model)
    with pytest.raises(ValueError, match=r"seen must be \(windows, tokens >= 2\), got \(3, 1\)"):
        job.linearize(model, hedgehog(), torch.ones(3, 1).long(), windows(1))


def test_a_damaged_file_is_refused_and_the_model_left(model, tmp_path):
    result = job.linearize(model, hedgehog(1), windows(2), windows(1), steps=1, tune_steps=0)
    del result.training.learner["1"].map_q
    result.write(tmp_path / "layers")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="holds no hedgehog for this model"):
        training.load_conversion(model, tmp_path / "layers", "hedgehog")
    assert dict(model.named_modules()) == before
