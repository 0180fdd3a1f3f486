import pytest
import torch

import foveate
from attached import prompt
from foveate import ops
from foveate.nn._attention import Projections
from foveate.nn.decode.mea import MEA
from foveate.nn.decode.mqa import MQA
from layer_checks import heads_of, hidden_and_output, plain_attention, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    layer = foveate.create("mea", **{"dim": 32, "heads": 4} | options)
    with torch.no_grad():
        for p in (layer.mix_k, layer.mix_v):
            p += torch.randn(p.shape) / 2
        if layer.gain is not None:
            layer.gain += torch.randn(layer.gain.shape) / 4
    return layer


def full_heads(layer):
    """A multi-head layer of the same projections."""
    made = MQA(32, 4, 4, theta=layer.theta)
    made.load(Projections(*(p.weight for p in (layer.q, layer.k, layer.v, layer.out))))
    return made


@pytest.mark.parametrize("components", [1, 2, 4])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition_head_by_head(components, norm, causal):
    layer, x = build(components=components, norm=norm, theta=100.0), tokens(13)
    with torch.no_grad():
        q, k = (heads_of(part, x, 8, 100.0) for part in (layer.q, layer.k))
        v, outs = heads_of(layer.v, x, 8), []
        for h in range(4):
            keys = sum(k[:, c : c + 1] * layer.mix_k[c, h] for c in range(components))
            values = sum(v[:, c : c + 1] * layer.mix_v[c, h] for c in range(components))
            out = plain_attention(q[:, h : h + 1], keys, values, causal)
            if norm:
                out = out / out.square().mean(-1, keepdim=True).add(1e-7).sqrt() * layer.gain[h]
            outs.append(out)
        want = layer.out(torch.cat(outs, 1).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, causal=causal), want, atol=1e-4, rtol=1e-3)


def test_identity_mixing_without_norm_is_multi_head_attention():
    torch.manual_seed(0)
    layer, x = foveate.create("mea", dim=32, heads=4, norm=False, theta=100.0), tokens(13)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), full_heads(layer)(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("components", [1, 3, 4])
def test_folded_and_expanded_forms_agree(components):
    layer = build(components=components)
    made = torch.Generator().manual_seed(3)
    sizes = ((4, 1), (components, 20), (components, 20))
    q, k, v = (torch.randn(2, h, n, 8, generator=made) for h, n in sizes)
    with torch.no_grad():
        keys = torch.einsum("bcld,ch->bhld", k, layer.mix_k)
        values = torch.einsum("bcld,ch->bhld", v, layer.mix_v)
        want = ops.attend(q, keys, values, causal=True)
        got = layer._folded(q, k, v, True, None)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_mixing_and_rotation_commute():
    layer, x = build(), tokens(13)
    with torch.no_grad():
        turned = torch.einsum("bcld,ch->bhld", heads_of(layer.k, x, 8, 50.0), layer.mix_k)
        mixed = torch.einsum("bcld,ch->bhld", heads_of(layer.k, x, 8), layer.mix_k)
        later = heads_of(lambda y: y, mixed.transpose(1, 2).flatten(2), 8, 50.0)
    torch.testing.assert_close(turned, later, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("components", [1, 2, 4])
def test_the_cache_holds_component_heads_and_nothing_else(components):
    layer, x = build(components=components), tokens(20)
    with torch.no_grad():
        _, state = layer(x, return_state=True)
    held = state.keys.untyped_storage().nbytes() + state.values.untyped_storage().nbytes()
    assert held == 2 * 2 * components * 20 * 8 * 4


def test_all_components_reproduce_a_trained_layer(tiny_llama):
    layer, x, want = hidden_and_output(tiny_llama, prompt(30))
    theta, trained = tiny_llama.config.rope_parameters["rope_theta"], Projections.of(layer)
    made = MEA.converted(trained, 4, 2, theta=theta)
    with torch.no_grad():
        mixed = torch.einsum("cwd,ch->hwd", made.k.weight.view(2, 16, 64), made.mix_k)
        heads = trained.k.view(2, 16, 64).repeat_interleave(2, 0)
        torch.testing.assert_close(mixed, heads, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(made(x), want, atol=1e-5, rtol=1e-4)


def test_fewer_components_are_the_nearest_heads():
    made = torch.Generator().manual_seed(0)
    trained = Projections(*(torch.randn(32, 32, generator=made) for _ in range(4)))
    layer = MEA.converted(trained, 4, 2)
    heads = trained.k.view(4, -1)
    with torch.no_grad():
        mine = torch.einsum("cn,ch->hn", layer.k.weight.view(2, -1), layer.mix_k)
    missed = torch.linalg.svdvals(heads)[2:].square().sum()
    torch.testing.assert_close((heads - mine).square().sum(), missed)


def test_a_trained_layer_whose_heads_are_mixtures_needs_fewer_components():
    made = torch.Generator().manual_seed(0)
    parts = {n: torch.randn(2, 8 * 32, generator=made) for n in ("k", "v")}
    mixes = {n: torch.randn(4, 2, generator=made) for n in ("k", "v")}
    k, v = ((mixes[n] @ parts[n]).view(32, 32) for n in ("k", "v"))
    q, out = torch.randn(2, 32, 32, generator=made)
    trained = Projections(q, k, v, out)
    full, x = MQA(32, 4, 4), tokens(13)
    full.load(trained)
    with torch.no_grad():
        got = MEA.converted(trained, 4, 2)(x)
        torch.testing.assert_close(got, full(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"components": 5}, "at most 4 heads, got 5"),
        ({"components": 0}, "components must be at least 1"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_refuses_more_components_than_trained_heads():
    trained = Projections(*(torch.zeros(rows, 32) for rows in (32, 16, 16, 32)))
    with pytest.raises(ValueError, match="at most 2 trained kv heads, got 3"):
        MEA.converted(trained, 4, 3)
