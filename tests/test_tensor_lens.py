import pytest
import torch
import transformers as hf
from torch import nn

from attached import left_padded, prompt
from foveate.analysis.tensor_lens import TensorLens, operator, squared_norms
from foveate.hf.frozen import frozen_forward
from test_watch import eager_maps
from tiny_models import SIZES, build


def small(heads=2, **sizes):
    """A model of width 16."""
    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": heads}
    options |= {"num_key_value_heads": 1, "intermediate_size": 24} | sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**(SIZES | options))).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_operator_times_input_and_bias_is_the_models_output(family, dtype, near):
    model, ids = build(family).to(dtype), prompt(9)
    record = TensorLens(probes=0)(model, ids)
    whole = record["contribution"].sum(-1) + record["bias"]
    frozen = frozen_forward(model, ids)
    token = frozen.logits().argmax(-1)
    rows = model.get_output_embeddings().weight[token]
    want = (rows * frozen.hidden[:, -1]).sum(-1).detach()
    torch.testing.assert_close(whole, want, rtol=near, atol=near)
    if family == "llama":  # a model without biases
        assert float(record["bias"].abs().max()) < near * (1 + float(want.abs().max()))
        linear = torch.einsum("bolw,blw->bo", operator(frozen), frozen.entering)
        torch.testing.assert_close(linear, frozen.hidden[:, -1], rtol=near, atol=near)
    torch.testing.assert_close(
        model(ids).logits[:, -1].gather(1, token[:, None])[:, 0], want, rtol=1e-4, atol=1e-4
    )


def test_later_tokens_have_no_part():
    record = TensorLens(position=4, probes=2)(build("llama"), prompt(9))
    for name in ("contribution", "norm"):
        assert float(record[name][:, 5:].abs().max()) == 0
        assert float(record[name][:, :5].abs().min()) > 0


def test_attention_alone_is_a_product_of_kronecker_factors():
    """One head, no norms, no feed-forward part: Π (I + A_l ⊗ W_l), not a mean with the identity."""
    model, ids = small(heads=1), prompt(6)
    model.model.norm = nn.Identity()
    for block in model.model.layers:
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
        nn.init.zeros_(block.mlp.down_proj.weight)
    want = torch.eye(6 * 16)
    for block, p in zip(model.model.layers, eager_maps(model, ids), strict=True):
        own = block.self_attn.o_proj.weight @ block.self_attn.v_proj.weight
        want = (torch.eye(6 * 16) + torch.kron(p[0, 0], own)) @ want
    got = operator(frozen_forward(model, ids))[0]
    torch.testing.assert_close(got, want.view(6, 16, 6, 16)[-1], rtol=1e-3, atol=1e-5)


def test_probes_estimate_the_squares_of_the_norms():
    frozen = frozen_forward(small(), prompt(7))
    exact = operator(frozen).square().sum((1, 3))
    got = squared_norms(frozen, 400)
    # An estimate of 16 or fewer directions strays by sqrt(2 / 400) or less.
    torch.testing.assert_close(got, exact, rtol=3 * (2 / 400) ** 0.5, atol=0)
    apart = [squared_norms(frozen, 1, seed=seed) / exact - 1 for seed in range(100)]
    assert abs(float(torch.stack(apart).mean())) < 3 * (2 / 100) ** 0.5


def test_padded_texts_are_measured_as_alone():
    model, rows = build("llama"), (prompt(9, 1), prompt(6, 2))
    ids, mask = left_padded(*rows)
    both = TensorLens(probes=0)(model, {"input_ids": ids, "attention_mask": mask})
    for i, row in enumerate(rows):
        alone = TensorLens(probes=0)(model, row)
        got = both["contribution"][i, 9 - row.shape[1] :]
        torch.testing.assert_close(got, alone["contribution"][0], rtol=1e-3, atol=1e-4)


def test_a_token_can_be_chosen_and_a_later_start():
    model, ids = build("llama"), prompt(9)
    logits = model(ids).logits[0, -1]
    for start in (0, 3):
        record = TensorLens(start=start, probes=0)(model, ids, torch.tensor([7]))
        torch.testing.assert_close(record["logit"][0], logits[7], rtol=1e-4, atol=1e-4)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="probes must be at least 0, got -1"):
        TensorLens(probes=-1)
    with pytest.raises(ValueError, match=r"start must be in \[0, 4\), got 9"):
        TensorLens(start=9)(build("llama"), prompt(4))
