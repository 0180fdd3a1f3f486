import pytest
import torch
import transformers as hf

import foveate
from attached import left_padded, prompt
from foveate.hf.parts import Parts, head_logits, run
from foveate.hf.watch import watch
from tiny_models import FAMILIES, build


def eager_maps(model, ids, mask=None):
    """The maps that transformers itself makes, (B, H, L, L) by layer."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return maps


def tiny_encoder(kind):
    """A random encoder of text or of images, and inputs for it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48}
    torch.manual_seed(0)
    if kind == "vit":
        model = hf.ViTModel(hf.ViTConfig(**sizes, image_size=16, patch_size=4, num_channels=1))
        return model.eval(), {"pixel_values": torch.randn(2, 1, 16, 16)}
    model = hf.BertModel(hf.BertConfig(**sizes, vocab_size=64))
    ids = torch.randint(5, 64, (2, 9))
    return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", FAMILIES)
def test_watched_attention_is_the_models_own(family):
    model = build(family)
    ids, mask = left_padded(prompt(24, 1), prompt(15, 2))
    maps, seen_layers = [], []

    def attention(seen):
        seen_layers.append(seen.layer)
        rows = torch.arange(ids.shape[1])
        maps.append(foveate.ops.attention_rows(seen.q, seen.k, rows, **seen.options()))

    given = {"input_ids": ids, "attention_mask": mask}
    position = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        want = model(ids, attention_mask=mask, position_ids=position).logits
        with watch(model, attention=attention):
            hidden = run(model, given)
        again = model(ids, attention_mask=mask, position_ids=position).logits
    real = mask.bool()
    torch.testing.assert_close(head_logits(model, hidden)[real], want[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(again, want)
    assert seen_layers == list(range(4))
    if family == "gpt2":  # its eager maps take positions of the unpadded text
        return
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(
            ids, attention_mask=mask, position_ids=position, output_attentions=True
        ).attentions
    for own, theirs in zip(maps, eager, strict=True):
        rows = real[:, None, :].expand(-1, own.shape[1], -1)
        torch.testing.assert_close(own[rows], theirs[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_encoders_are_watched_too(kind):
    model, inputs = tiny_encoder(kind)
    causal = []
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        with watch(model, attention=lambda seen: causal.append(seen.causal)):
            got = run(model, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert causal == [False, False]


def test_streams_add_up_and_can_be_changed():
    model, held = build("llama"), {}

    def keep(name):
        return lambda layer, x: held.__setitem__((name, layer), x)

    places = ("block_in", "attention_out", "mlp_out", "block_out")
    with torch.no_grad(), watch(model, **{name: keep(name) for name in places}):
        run(model, prompt(12))
    for layer in range(4):
        parts = [held[name, layer] for name in places[:3]]
        torch.testing.assert_close(sum(parts), held["block_out", layer])
    with torch.no_grad(), watch(model, block_in=lambda layer, x: 0 * x if layer == 3 else None):
        changed = run(model, prompt(12))
    assert not torch.allclose(changed, Parts(model).final_norm()(held["block_out", 3]))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_statistics_and_outputs_come_from_one_pass_and_a_bias_from_another(family):
    model, ids = build(family), prompt(20, 2)
    plain = run(model, ids)
    passes, means = [], []

    def measuring(seen):
        before = seen.attend
        seen.attend = lambda *x: passes.append(seen.layer) or before(*x)
        u = torch.randn(*seen.k.shape[:3], 2, generator=torch.Generator().manual_seed(0))
        means.append(seen.row_stats(u).means)
        torch.testing.assert_close(
            means[-1], foveate.ops.row_stats(seen.q, seen.k, u, **seen.options()).means
        )

    with watch(model, attention=measuring):
        torch.testing.assert_close(run(model, ids), plain, rtol=1e-4, atol=1e-4)
    assert passes == []

    def biased(seen):
        seen.row_stats()
        if seen.layer == 1:
            seen.bias = torch.linspace(0, 9, ids.shape[1]).expand(1, 1, ids.shape[1], -1)

    with watch(model, attention=biased):
        assert not torch.allclose(run(model, ids), plain, atol=1e-2)


def test_watches_nest_and_the_inner_sees_what_the_outer_changed():
    model, outs = build("llama"), []
    with (
        torch.no_grad(),
        watch(model, attention=lambda seen: torch.ones_like(seen.out)),
        watch(model, attention=lambda seen: outs.append(seen.out)),
    ):
        run(model, prompt(8))
    assert len(outs) == 4 and all(bool((out == 1).all()) for out in outs)


def test_contributions_of_heads_sum_to_what_attention_adds():
    for family in ("llama", "gpt2"):
        model, outs, added = build(family), [], []
        with (
            torch.no_grad(),
            watch(
                model,
                attention=lambda seen, outs=outs: outs.append(seen.out),
                attention_out=lambda layer, x, added=added: added.append(x),
            ) as parts,
        ):
            run(model, prompt(8))
            for layer, (out, whole) in enumerate(zip(outs, added, strict=True)):
                _, bias = parts.projection(layer)
                own = parts.contributions(layer, out).sum(1) + (0 if bias is None else bias)
                torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-5)


def test_refusals():
    model = build("llama")
    with pytest.raises(TypeError, match="wanted a transformers model, got int"):
        Parts(3)
    with pytest.raises(IndexError, match=r"4 layers of 4 heads.*no head \(4, 0\)"):
        Parts(model).check_heads([(4, 0)])
    with foveate.attach(model), pytest.raises(RuntimeError, match="is attached"), watch(model):
        pass
    with watch(model), pytest.raises(RuntimeError, match="under watch"):
        foveate.attach(model)
    twin = hf.LlamaForCausalLM(model.config).eval()
    with watch(model), pytest.raises(RuntimeError, match="shares its config"):
        run(twin, prompt(4))
    encoder, _ = tiny_encoder("bert")
    with pytest.raises(TypeError, match="BertModel has no language-model head"):
        head_logits(encoder, torch.zeros(1, 32))
    with (
        pytest.raises(TypeError, match="no feed-forward part in block 0"),
        watch(encoder, mlp_out=lambda layer, x: None),
    ):
        pass
    with (
        pytest.raises(ValueError, match="outputs of layer 0 are"),
        watch(model, attention=lambda seen: seen.out[:1, :1]),
    ):
        run(model, prompt(4))
    assert model.config._attn_implementation_internal != "foveate_watch"
