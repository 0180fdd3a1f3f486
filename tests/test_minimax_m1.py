import itertools

import pytest
import torch

import foveate
from foveate.nn import Transformer
from foveate.nn.linear.minimax_m1 import cispo_loss, group_advantages
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    options = {"dim": 32, "heads": 4, "index": 1, "layers": 3} | options
    return foveate.create("minimax_m1", **options)


def pair(index):
    """The layer of transformers and ours with its weights."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=3,
        block_size=16,
        layer_types=["linear_attention"] * 3,
    )
    torch.manual_seed(1)
    theirs, mine = MiniMaxLightningAttention(config, index).eval(), build(index=index)
    copies = {
        "qkv.weight": theirs.qkv_proj.weight,
        "readout.norm.weight": theirs.norm.weight,
        "readout.gate.weight": theirs.output_gate.weight,
        "readout.out.weight": theirs.out_proj.weight,
    }
    mine.load_state_dict(copies)
    return theirs, mine


@pytest.mark.parametrize("index", [0, 1, 2])
def test_equals_the_layer_of_transformers(index):
    (theirs, mine), x = pair(index), tokens(70)
    with torch.no_grad():
        want, last = theirs(x, None, None)
        got, state = mine(x, return_state=True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state.s, last, atol=1e-5, rtol=1e-5)


def test_goes_on_from_a_cache_as_transformers_does():
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    (theirs, mine), x = pair(1), tokens(45)
    cache = MiniMaxCache()
    with torch.no_grad():
        theirs(x[:, :40], None, None, past_key_values=cache)
        _, state = mine(x[:, :40], return_state=True)
        want, _ = theirs(x[:, 40:], None, None, past_key_values=cache)
        got = mine(x[:, 40:], state=state)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_lower_layers_forget_faster():
    slopes = [build(index=index).slopes for index in range(3)]
    for lower, upper in itertools.pairwise(slopes):
        assert all(a > b > 0 for a, b in zip(lower, upper, strict=True))


def test_seven_layers_and_one_of_softmax_decode_what_they_give_at_once():
    torch.manual_seed(0)
    model = Transformer(16, 32, "minimax_m1*7, softmax_attention", mlp=0)
    slopes = [block.layer.slopes[0] for block in model.stack.blocks[:7]]
    assert slopes == sorted(slopes, reverse=True) and slopes[6] == pytest.approx(1 / 28, rel=1e-3)
    ids = torch.randint(16, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, state = model(ids[:, :15], return_state=True)
        got, _ = model(ids[:, 15:], state=state, return_state=True)
        torch.testing.assert_close(got, model(ids)[:, 15:], atol=1e-5, rtol=1e-4)


def tokens_of_answers(seed=0, answers=4, length=6):
    made = torch.Generator().manual_seed(seed)
    new = -3 * torch.rand(answers, length, generator=made).double()
    old = new + 0.8 * torch.randn(answers, length, generator=made).double()
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0]).double()
    return new.requires_grad_(), old, group_advantages(rewards)


def test_every_token_keeps_the_gradient_of_its_clipped_weight():
    new, old, advantages = tokens_of_answers()
    cispo_loss(new, old, advantages, upper=0.2).backward()
    ratio = (new.detach() - old).exp()
    want = -ratio.clamp(0.0, 1.2) * advantages[:, None] / new.numel()
    torch.testing.assert_close(new.grad, want)
    clipped = ratio > 1.2
    assert clipped.any() and bool((new.grad[clipped] != 0).all())


def test_weights_are_clipped_below_only_where_asked():
    new, old, advantages = tokens_of_answers()
    cispo_loss(new, old, advantages, upper=0.2, lower=0.1).backward()
    ratio = (new.detach() - old).exp()
    assert bool((ratio < 0.9).any())
    torch.testing.assert_close(new.grad, -ratio.clamp(0.9, 1.2) * advantages[:, None] / new.numel())


def test_tokens_count_alike_in_long_and_short_answers():
    new, old, advantages = tokens_of_answers()
    valid = torch.arange(6) < torch.tensor([6, 2, 3, 1])[:, None]
    loss = cispo_loss(new, old, advantages, upper=0.2, valid=valid)
    ratio = (new - old).exp().clamp(0, 1.2).detach()
    terms = ratio * advantages[:, None] * new
    torch.testing.assert_close(loss, -terms[valid].sum() / 12)
    other = torch.where(valid, old, old + 5)
    torch.testing.assert_close(cispo_loss(new, other, advantages, upper=0.2, valid=valid), loss)


def test_advantages_are_rewards_within_their_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    want = torch.tensor([[1.0, -1.0, -1.0, 1.0], [0.0] * 4])
    torch.testing.assert_close(group_advantages(rewards), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"old_log_p": torch.zeros(4, 5)}, r"old_log_p must be \(4, 6\)"),
        ({"advantages": torch.zeros(6)}, r"advantages must be \(4,\)"),
        ({"valid": torch.ones(4, 5).bool()}, r"valid must be \(4, 6\)"),
        ({"upper": -0.1}, "upper must be >= 0"),
        ({"lower": 1.5}, r"lower in \[0, 1\]"),
    ],
)
def test_refuses_what_does_not_fit(changes, said):
    new, old, advantages = tokens_of_answers()
    call = {"log_p": new, "old_log_p": old, "advantages": advantages, "upper": 0.2} | changes
    with pytest.raises(ValueError, match=said):
        cispo_loss(**call)
