import pytest
import torch

from attached import left_padded, prompt
from foveate.hf.frozen import frozen_forward
from foveate.hf.noise import AttentionNoise
from foveate.hf.parts import run
from test_watch import tiny_encoder
from tiny_models import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frozen_pass_is_the_models_and_affine(family):
    """It gives what the model gives, and its Jacobian times its input is it, less a constant."""
    model, ids = build(family).double(), prompt(12)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    frozen = frozen_forward(model, ids)
    with torch.no_grad():
        plain = run(model, ids)
    # transformers takes the scales of norms in float32 whatever the model's type is
    torch.testing.assert_close(frozen.hidden, plain, rtol=1e-5, atol=1e-5)
    u = torch.randn(1, plain.shape[-1], dtype=torch.float64)
    linear = float((frozen.pull(u) * frozen.entering).detach().sum())
    whole = float((u * frozen.hidden[:, -1]).detach().sum())
    if family in ("gpt2", "qwen2"):  # these have biases on values, which are constants
        assert abs(whole - linear) > 1e-3
    else:
        assert abs(whole - linear) < 1e-9 * (1 + abs(whole))


def test_contributions_are_causal_and_sum_to_the_logit():
    model = build("llama")
    ids, mask = left_padded(prompt(12, 1), prompt(7, 2))
    frozen = frozen_forward(model, {"input_ids": ids, "attention_mask": mask})
    token = frozen.logits().argmax(-1)
    parts = frozen.contributions(token)
    want = frozen.logits().gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(parts.sum(1), want, rtol=1e-4, atol=1e-4)
    assert bool((parts[1, :5] == 0).all())
    early = frozen.contributions(token, position=8)
    assert bool((early[:, 9:] == 0).all())


def test_a_later_start_leaves_the_first_layers_out():
    model, ids = build("llama"), prompt(12)
    whole, late = frozen_forward(model, ids), frozen_forward(model, ids, start=3)
    torch.testing.assert_close(late.hidden, whole.hidden, rtol=1e-4, atol=1e-5)
    token = late.logits().argmax(-1)
    want = late.logits().gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(late.contributions(token).sum(1), want, rtol=1e-4, atol=1e-4)


def test_noise_on_logits_has_a_gradient_and_none_is_nothing():
    model, ids = build("llama"), prompt(10)
    delta = torch.zeros(1, 4, 10, 10, requires_grad=True)
    with torch.no_grad():
        plain = run(model, ids)
    with AttentionNoise(model, {1: delta}).added():
        hidden = run(model, ids)
    torch.testing.assert_close(hidden, plain, rtol=1e-4, atol=1e-5)
    (hidden * torch.randn_like(hidden)).sum().backward()
    assert float(delta.grad.abs().max()) > 1e-2
    later = torch.ones(10, 10).triu(1).bool()
    assert float(delta.grad[..., later].abs().max()) == 0
    sums = delta.grad.sum(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-2)


def test_bad_input_is_named():
    model = build("llama")
    with pytest.raises(ValueError, match=r"start must be in \[0, 4\), got 4"):
        frozen_forward(model, prompt(4), start=4)
    with pytest.raises(IndexError, match="has 4 layers, no layer 7"):
        AttentionNoise(model, {7: torch.zeros(1, 1, 1, 1)})
    encoder, inputs = tiny_encoder("bert")
    with pytest.raises(TypeError, match="no feed-forward part"):
        frozen_forward(encoder, inputs)
