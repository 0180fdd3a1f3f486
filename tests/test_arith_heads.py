from dataclasses import replace

import pytest
import torch

from attached import prompt
from foveate.analysis._prompts import where
from foveate.analysis.arith_heads import ArithHeads, answer_logits
from foveate.hf.ablate import head_outputs
from foveate.hf.parts import Parts
from foveate.tasks.prompt import Prompt
from test_watch import eager_maps
from tiny_models import build

SPANS = {"a": (1, 2), "operator": (2, 3), "b": (3, 5)}


def question(length, seed, corrupt=None):
    """A prompt of random tokens."""
    answer = torch.tensor([3 + seed, 9])
    return Prompt("", prompt(length, seed), answer, SPANS, torch.tensor([50]), corrupt)


def pair(length, seed):
    """A prompt with a counterfactual."""
    return question(length, seed, question(length, seed + 20))


def test_patching_a_prompt_with_itself_does_nothing():
    own = question(8, 1)
    record = ArithHeads()(build("llama"), [replace(own, corrupt=own)])
    assert float(record["difference"].abs().max()) < 1e-4
    assert ArithHeads().key_heads(record) == []


def test_a_head_of_the_last_layer_adds_its_direct_part_to_the_logit():
    """Without the last feed-forward part, and with the final norm's scale frozen at clean."""
    model, asked = build("llama"), pair(8, 1)
    torch.nn.init.zeros_(model.model.layers[3].mlp.down_proj.weight)
    parts = Parts(model)
    outs = [head_outputs(model, x)[3][:, :, -1:] for x in (asked.ids, asked.corrupt.ids)]
    added = parts.contributions(3, outs[1] - outs[0])[0, :, 0]
    with torch.no_grad():
        hidden = model(asked.ids, output_hidden_states=True)
        norm, held = model.model.norm, []
        hook = norm.register_forward_hook(lambda m, args, out: held.append(args[0]))
        model(asked.ids)
        hook.remove()
        scale = held[0][0, -1].pow(2).mean().add(norm.variance_epsilon).sqrt()
        row = model.lm_head.weight[asked.answer[0]] * norm.weight
        direct = added @ row / scale
        moved = held[0][0, -1] + added
        rescaled = moved.pow(2).mean(-1).add(norm.variance_epsilon).sqrt()
        want = (held[0][0, -1] @ row) * (1 / rescaled - 1 / scale) + direct * scale / rescaled
    got = ArithHeads()(model, [asked])
    torch.testing.assert_close(got["difference"][3], want, rtol=1e-3, atol=1e-4)
    plain = hidden.logits[0, -1, asked.answer[0]].abs()
    torch.testing.assert_close(got["effect"], got["difference"] / plain, rtol=1e-4, atol=1e-5)


def test_prompts_of_two_lengths_are_measured_as_alone():
    model, asked = build("llama"), [pair(8, 1), pair(11, 2)]
    both = ArithHeads()(model, asked)
    alone = [ArithHeads()(model, [one]) for one in asked]
    for name in ("effect", "difference", "operands", "operator"):
        want = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(both[name], want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(both["size"], both["effect"].abs())
    logits = [model(one.ids).logits[0, -1, one.answer[0]] for one in asked]
    torch.testing.assert_close(
        answer_logits(model, asked), torch.stack(logits).detach(), rtol=1e-4, atol=1e-4
    )


def test_where_heads_look_is_the_mass_on_the_spans():
    model, asked = build("llama"), pair(8, 1)
    record = ArithHeads()(model, [asked])
    for layer, p in enumerate(eager_maps(model, asked.ids)):
        last = p[0, :, -1]
        torch.testing.assert_close(record["operator"][layer], last[:, 2], rtol=1e-3, atol=1e-5)
        want = last[:, [1, 3, 4]].sum(-1)
        torch.testing.assert_close(record["operands"][layer], want, rtol=1e-3, atol=1e-5)
    assert where([asked, pair(10, 2)], "a").nonzero().tolist() == [[0, 3], [1, 1]]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="threshold must be above 0, got 0"):
        ArithHeads(threshold=0.0)
    with pytest.raises(ValueError, match="counterfactual, prompt 1 has none"):
        ArithHeads()(build("llama"), [pair(8, 1), question(8, 2)])
    with pytest.raises(ValueError, match="at least one prompt"):
        ArithHeads()(build("llama"), [])
