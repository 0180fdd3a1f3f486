import pytest
import torch
from torch import nn

import foveate
from attached import prompt
from foveate import ops
from foveate.nn._attention import Projections
from foveate.nn.decode.mqa import MQA
from layer_checks import heads_of, hidden_and_output, plain_attention, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("mqa", **{"dim": 32, "heads": 4, "kv_heads": 1} | options)


def weights(kv_heads=4, seed=0):
    made = torch.Generator().manual_seed(seed)
    sizes = ((32, 32), (8 * kv_heads, 32), (8 * kv_heads, 32), (32, 32))
    return Projections(*(torch.randn(size, generator=made) for size in sizes))


@pytest.mark.parametrize("theta", [None, 100.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_equals_the_definition_head_by_head(theta, kv_heads, causal, cross):
    layer, x = build(kv_heads=kv_heads, theta=theta), tokens(13)
    context = tokens(21, seed=2) if cross else x
    with torch.no_grad():
        q = heads_of(layer.q, x, 8, theta, first=context.shape[1] - 13)
        k = heads_of(layer.k, context, 8, theta)
        v = heads_of(layer.v, context, 8)
        outs = []
        for h in range(4):
            kv = slice(h // (4 // kv_heads), h // (4 // kv_heads) + 1)
            outs.append(plain_attention(q[:, h : h + 1], k[:, kv], v[:, kv], causal))
        want = layer.out(torch.cat(outs, 1).transpose(1, 2).flatten(2))
        got = layer(x, context=context if cross else None, causal=causal)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_one_head_equals_full_heads_whose_projections_are_copies():
    one, full = build(), build(kv_heads=4)
    copies = {name: getattr(one, name).weight.repeat(4, 1) for name in ("k", "v")}
    full.load(Projections(one.q.weight, copies["k"], copies["v"], one.out.weight))
    x = tokens(13)
    with torch.no_grad():
        torch.testing.assert_close(full(x), one(x), atol=1e-6, rtol=1e-5)


def test_queries_of_all_heads_may_be_rows_of_one_problem():
    layer, x = build(), tokens(13)
    with torch.no_grad():
        q, k, v = (heads_of(part, x, 8) for part in (layer.q, layer.k, layer.v))
        rows = q.flatten(1, 2)[:, None]
        mask = ops.Mask(lambda b, h, i, j: j <= i % 13)
        folded = ops.attend(rows, k, v, mask=mask, q_pos=torch.arange(4 * 13))
        out = layer.attend(q, k, v, True, None)
    torch.testing.assert_close(folded[:, 0].unflatten(1, (4, 13)), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_cache_holds_kv_heads_and_nothing_else(kv_heads):
    layer, x = build(kv_heads=kv_heads), tokens(20)
    with torch.no_grad():
        _, state = layer(x, return_state=True)
        _, state = layer.step(x[:, 0], state)
    held = state.keys.untyped_storage().nbytes() + state.values.untyped_storage().nbytes()
    assert state.pos == 21 and held == 2 * 2 * kv_heads * 21 * 8 * 4


def test_conversion_is_exact_where_the_heads_of_a_group_were_equal():
    full = weights()
    pairs = full.k.view(2, 2, 8, 32)[:, :1].expand(2, 2, 8, 32).reshape(32, 32)
    trained = build(kv_heads=4, theta=100.0)
    trained.load(full._replace(k=pairs, v=pairs.flip(1)))
    layer = MQA.converted(full._replace(k=pairs, v=pairs.flip(1)), 4, 2, theta=100.0)
    x = tokens(13)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), trained(x), atol=1e-5, rtol=1e-4)


def test_conversion_takes_the_mean_of_each_group():
    full = weights()
    layer = MQA.converted(full, 4, 2)
    for name in ("k", "v"):
        heads = getattr(full, name).view(4, 8, 32)
        want = torch.cat(((heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2))
        torch.testing.assert_close(getattr(layer, name).weight.detach(), want)


def test_a_layer_of_a_model_is_taken_over_as_it_is(tiny_llama):
    layer, x, want = hidden_and_output(tiny_llama, prompt(30))
    theta = tiny_llama.config.rope_parameters["rope_theta"]
    mine = MQA.converted(Projections.of(layer), 4, 2, theta=theta)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"heads": 5}, "dim must be a multiple of heads"),
        ({"kv_heads": 0}, "kv_heads must be at least 1"),
        ({"theta": 1.0, "head_dim": 7}, "even width, got 7"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_refuses_layers_it_cannot_take_over():
    with pytest.raises(TypeError, match="q_proj, k_proj, v_proj and o_proj, got Linear"):
        Projections.of(nn.Linear(2, 2))
    biased = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(biased, name, nn.Linear(4, 4, bias=name == "k_proj"))
    with pytest.raises(ValueError, match="no biases"):
        Projections.of(biased)
    with pytest.raises(ValueError, match="3 trained kv heads do not divide into 2"):
        MQA.converted(weights(3), 4, 2)
    with pytest.raises(ValueError, match=r"projection k must be \(8, 32\), got \(16, 32\)"):
        build().load(weights(2))


def test_refuses_a_state_where_none_is_kept():
    layer, x = build(), tokens(5)
    _, state = layer(x, return_state=True)
    for given in ({"context": x, "state": state}, {"causal": False, "return_state": True}):
        with pytest.raises(ValueError, match="causal self-attention only"):
            layer(x, **given)
