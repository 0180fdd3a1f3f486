from dataclasses import replace

import pytest
import torch

from attached import prompt
from foveate.analysis.circuit_reuse import CircuitReuse, circuit, differences, look_at, reused
from foveate.hf.ablate import force
from foveate.hf.parts import head_logits, run
from foveate.hf.patch import path_patch
from foveate.hf.watch import watch
from foveate.tasks.prompt import Prompt
from tiny_models import build


def asked(length, seed):
    """A prompt of random tokens with a counterfactual."""
    spans = {"wrong": (1, 2), "answer": (3, 5)}
    parts = torch.tensor([7]), spans, torch.tensor([50, 60])
    return Prompt("", prompt(length, seed), *parts, Prompt("", prompt(length, seed + 9), *parts))


def test_patching_prompts_with_themselves_finds_nothing():
    own = asked(8, 1)
    record = CircuitReuse(steps=2)(build("llama"), [replace(own, corrupt=own)])
    assert float(record["effect 0"].abs().max()) < 1e-4
    assert float(record["effect 1"].abs().max()) < 1e-4


def test_first_step_is_the_direct_effect_on_the_difference():
    model, prompts = build("llama"), [asked(8, 1), asked(11, 2)]
    both = CircuitReuse()(model, prompts)
    alone = [CircuitReuse()(model, [one])["effect 0"] for one in prompts]
    torch.testing.assert_close(both["effect 0"], sum(alone) / 2, rtol=1e-3, atol=1e-4)
    logits = torch.randn(3, 2, 128)
    want = logits[..., 7] - logits[..., [50, 60]].mean(-1)
    torch.testing.assert_close(differences(prompts)(logits), want)


def test_second_step_is_path_patching_into_the_heads_of_the_first():
    model, one = build("llama"), asked(8, 1)
    with torch.no_grad():  # else a random model is read through its first layer alone
        model.model.layers[3].self_attn.o_proj.weight *= 20
    record = CircuitReuse(share=0.15, steps=2, via="qv")(model, [one])
    first = [tuple(x) for x in (record["found"] == 1).nonzero().tolist()]
    assert first == sorted(record.ranked()[:2])
    plain = float(one.difference(model(one.ids).logits[:, -1]).detach())
    changes = []
    for via in "qv":
        hidden = path_patch(model, one.ids, one.corrupt.ids, [(0, 1)], first, via=via)
        moved = one.difference(head_logits(model, hidden[:, -1])).detach()
        changes.append(float(moved) - plain)
    want = max(changes, key=abs)
    assert float(record["effect 1"][0, 1]) == pytest.approx(want, rel=1e-3, abs=1e-4)
    latest = max(layer for layer, _ in first)
    assert float(record["effect 1"][latest:].abs().max()) == 0
    later = {head for head in circuit(record) if head not in first}
    assert later and all(layer < latest for layer, _ in later)


def test_shares_of_circuits():
    model = build("llama")
    small, large = (CircuitReuse(share=x)(model, [asked(8, 1)]) for x in (0.25, 0.5))
    other = CircuitReuse(share=0.25)(model, [asked(8, 5)])
    assert reused(small, small) == reused(small, large) == 1 and reused(large, small) == 0.5
    assert 0 <= reused(small, other) <= 1


def test_forced_heads_change_the_last_row_alone_and_their_own_weights_nothing():
    model, one, rows = build("llama"), asked(8, 1), []
    last = torch.tensor([7])
    with torch.no_grad():
        plain = run(model, one.ids)
        with watch(model, attention=lambda seen: rows.append(seen.rows(last)[0, :, 0])):
            run(model, one.ids)
        with look_at(model, [(3, 2)], one, "answer"):
            moved = run(model, one.ids)
        torch.testing.assert_close(moved[:, :-1], plain[:, :-1], rtol=1e-5, atol=1e-5)
        assert float((moved - plain)[:, -1].abs().max()) > 1e-3
        held = []
        with (
            look_at(model, [(1, 2)], one, "answer", "wrong"),
            watch(model, attention=lambda seen: held.append(seen)),
        ):
            run(model, one.ids)
        want = held[1].v[0, 1, [1, 3, 4]].mean(0)
        torch.testing.assert_close(held[1].out[0, 2, -1], want, rtol=1e-5, atol=1e-6)
        with force(model, [(1, 2)], rows[1][2]):
            same = run(model, one.ids)
        torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        CircuitReuse(steps=0)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        CircuitReuse(share=0.0)
    with pytest.raises(ValueError, match='via must be some of "q", "k" and "v", got \'o\''):
        CircuitReuse(via="o")
    with pytest.raises(ValueError, match="counterfactual, prompt 0 has none"):
        CircuitReuse()(build("llama"), [replace(asked(8, 1), corrupt=None)])
    with pytest.raises(KeyError, match="giver"):
        look_at(build("llama"), [(0, 0)], asked(8, 1), "giver")
