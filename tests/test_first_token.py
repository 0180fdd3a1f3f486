import pytest
import torch

from attached import left_padded, prompt
from foveate.analysis.first_token import FirstToken, hide_first, mixing
from foveate.hf.ablate import ablate
from foveate.hf.parts import run
from test_watch import eager_maps
from tiny_models import build

AT = 6


def changed(ids, at=AT):
    other = ids.clone()
    other[:, at] = (other[:, at] + 1) % 128
    return other


def test_what_comes_before_the_change_stays_and_no_change_spreads_nothing():
    model, ids = build("llama"), prompt(20)
    spread = FirstToken()(model, ids, changed(ids))["spread"][:, 0]
    assert float(spread[:, :AT].max()) == 0 and float(spread[:, AT:].min()) > 0
    assert float(FirstToken()(model, ids, ids)["spread"].max()) == 0


def test_a_change_stays_where_it_is_when_all_heads_look_at_the_first_token():
    model, ids = build("llama"), prompt(20)
    with ablate(model, [(layer, head) for layer in range(4) for head in range(4)], "sink"):
        spread = FirstToken()(model, ids, changed(ids))["spread"][:, 0]
    assert float(spread[:, AT].min()) > 0
    spread[:, AT] = 0
    assert float(spread.max()) == 0


def test_hiding_the_first_token_in_all_layers_is_a_text_without_it():
    model, ids = build("llama"), prompt(20)
    with torch.no_grad(), hide_first(model, 0):
        hidden = run(model, ids)
    with torch.no_grad():
        without, plain = run(model, ids[:, 1:]), run(model, ids)
    torch.testing.assert_close(hidden[:, 1:], without, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden[:, 0], plain[:, 0], rtol=1e-4, atol=1e-4)


def test_hiding_from_a_layer_on_leaves_those_before_as_they_are():
    model, ids = build("llama"), prompt(20)
    plain = FirstToken()(model, ids, changed(ids))
    hidden = FirstToken(hidden_from=2)(model, ids, changed(ids))
    assert torch.equal(plain["spread"][:2], hidden["spread"][:2])
    assert torch.equal(plain["weight"][:2], hidden["weight"][:2])
    assert float(hidden["weight"][2:].max()) == 0 < float(plain["weight"][2:].min())


def test_weights_are_those_of_the_models_own_map():
    model, ids = build("gemma2"), torch.cat([prompt(30), prompt(30, 1)])
    record = FirstToken(eps=0.05)(model, ids, ids)
    for layer, p in enumerate(eager_maps(model, ids)):
        own = p[:, :, 1:, 0].mean(-1)
        torch.testing.assert_close(record["weight"][layer], own.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(record["sink"][layer], (own > 0.05).float().mean(0))


def test_padded_texts_are_measured_as_they_are_alone():
    model, rows = build("llama"), (prompt(20, 1), prompt(13, 2))
    others = changed(rows[0], 15), changed(rows[1], 8)
    (ids, mask), (other, _) = left_padded(*rows), left_padded(*others)
    for start in (None, 1):
        measure = FirstToken(hidden_from=start)
        given = ({"input_ids": x, "attention_mask": mask} for x in (ids, other))
        both = measure(model, *given)
        alone = [measure(model, row, change) for row, change in zip(rows, others, strict=True)]
        for name in ("weight", "value"):
            want = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(both[name], want, rtol=1e-4, atol=1e-5, msg=name)
        for i, record in enumerate(alone):
            n = rows[i].shape[1]
            got = both["spread"][:, i, 20 - n :]
            torch.testing.assert_close(got, record["spread"][:, 0], rtol=1e-3, atol=1e-5)


def test_mixing_estimates_the_norm_of_the_jacobian():
    model, ids = build("llama"), prompt(8)
    held = model.get_input_embeddings()(ids).detach()

    def last_but_one(x):
        out = []
        hook = model.model.layers[3].register_forward_hook(lambda m, a, y: out.append(y))
        model.model(inputs_embeds=x, use_cache=False)
        hook.remove()
        return (out[0][0] if isinstance(out[0], tuple) else out[0])[0, 5]

    jacobian = torch.autograd.functional.jacobian(last_but_one, held)[:, 0]
    made = torch.Generator().manual_seed(0)
    back = [torch.einsum("olw,o->lw", jacobian, torch.randn(64, generator=made)) for _ in range(3)]
    want = (sum(x.square().sum(1) for x in back) / 3).sqrt()
    got = mixing(model, ids, position=5, probes=3)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    exact = jacobian.norm(dim=(0, 2))[:6]
    rough = mixing(model, ids, position=5, probes=40)[0, :6]
    assert float((rough / exact - 1).abs().mean()) < 0.2
    assert float(got[6:].max()) == 0
    assert torch.equal(mixing(model, ids), mixing(model, ids))


def test_bad_input_is_named():
    model = build("llama")
    with pytest.raises(ValueError, match="must have the lengths and padding"):
        FirstToken()(model, prompt(9), prompt(8))
    with pytest.raises(ValueError, match="texts of at least 2 tokens"):
        FirstToken()(model, prompt(1), prompt(1))
    with pytest.raises(ValueError, match=r"eps must be in \(0, 1\), got 0"):
        FirstToken(eps=0.0)
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        FirstToken(hidden_from=-1)(model, prompt(9), prompt(9))
