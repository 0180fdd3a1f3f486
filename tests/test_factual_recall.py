import pytest
import torch

from attached import prompt
from foveate.analysis.factual_recall import FactualRecall, heads_in_mlp, scaled
from foveate.hf.parts import Parts, run
from foveate.tasks.prompt import Prompt
from tiny_models import build


def asked(length, seed):
    """A prompt of random tokens."""
    return Prompt(
        "", prompt(length, seed), torch.tensor([7]), {"subject": (2, 4)}, torch.tensor([])
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("target", ["answer", "top", "subject"])
def test_contributions_sum_to_the_logit(family, target):
    model, one = build(family), asked(9, 1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    record = FactualRecall(target=target)(model, [one])
    logits = model(one.ids).logits[0, -1].detach()
    token = {"answer": 7, "top": int(logits.argmax()), "subject": int(one.ids[0, 3])}[target]
    torch.testing.assert_close(record["logit"], logits[token], rtol=1e-4, atol=1e-4)
    parts = record["start"] + record["attention"].sum() + record["mlp"].sum()
    bias = getattr(Parts(model).final_norm(), "bias", None)
    row = model.get_output_embeddings().weight[token].detach()
    constant = torch.tensor(0.0) if bias is None else bias.detach() @ row
    torch.testing.assert_close(record["constant"], constant, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(parts + constant, record["logit"], rtol=1e-4, atol=1e-4)
    if family != "gpt2":  # its output projection has a bias, which is no head's
        heads = record["head"].sum(1)
        torch.testing.assert_close(heads, record["attention"], rtol=1e-3, atol=1e-4)


def test_what_all_tokens_get_alike_is_centred_away():
    model, one = build("llama"), asked(9, 1)
    before = FactualRecall()(model, [one])
    with torch.no_grad():
        model.lm_head.weight += torch.randn(64)
    after = FactualRecall()(model, [one])
    assert not torch.allclose(after["head"], before["head"], atol=1e-2)
    for name in ("head centred", "mlp centred"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-4)


def test_prompts_of_two_lengths_are_measured_as_alone():
    model, prompts = build("llama"), [asked(9, 1), asked(6, 2)]
    both = FactualRecall()(model, prompts)
    alone = [FactualRecall()(model, [one]) for one in prompts]
    for name in ("head", "mlp", "logit", "mlp negative"):
        want = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(both[name], want, rtol=1e-3, atol=1e-4)


def test_the_weights_of_a_linear_feed_forward_part_are_found():
    torch.manual_seed(0)
    heads, stream = torch.randn(12, 3, 16), torch.randn(12, 16)
    weights = torch.tensor([1.0, -1.0, 0.3])
    mlp = (weights[:, None] * heads).sum(1) + 0.5 * stream
    want = torch.tensor([1.0, -1.0, 0.3, 0.5]).double()
    torch.testing.assert_close(heads_in_mlp(mlp, heads, stream), want, rtol=1e-5, atol=1e-6)


def test_scaling_by_one_is_nothing_and_by_zero_takes_the_part_away():
    model, ids = build("llama"), prompt(9)
    with torch.no_grad():
        plain = run(model, ids)
        with scaled(model, 1.0):
            torch.testing.assert_close(run(model, ids), plain, rtol=1e-5, atol=1e-5)
        for part, module in (("mlp", "mlp.down_proj"), ("attention", "self_attn.o_proj")):
            with scaled(model, 0.0, part):
                without = run(model, ids)
            other = build("llama")
            other.model.layers[3].get_submodule(module).weight.zero_()
            torch.testing.assert_close(without, run(other, ids), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(without, plain, atol=1e-3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown target 'answers'; did you mean 'answer'"):
        FactualRecall(target="answers")
    with pytest.raises(TypeError, match="do not simply add"):
        FactualRecall()(build("gemma2"), [asked(6, 1)])
    with (
        pytest.raises(ValueError, match='part must be "mlp" or "attention"'),
        scaled(build("llama"), 0.5, "norm"),
    ):
        pass
    with pytest.raises(IndexError, match="no layer 4"), scaled(build("llama"), 0.5, layer=4):
        pass
