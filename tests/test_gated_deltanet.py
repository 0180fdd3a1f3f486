import pytest
import torch

import foveate
from foveate import ops
from layer_checks import tokens


def build(name="gated_deltanet", seed=0, **options):
    torch.manual_seed(seed)
    options = {"dim": 32, "heads": 2, "expand_k": 1.0, "expand_v": 2.0} | options
    return foveate.create(name, **options)


def qwen(v_heads=4):
    """The layer of Qwen3-Next with random weights: 2 key heads of 16, v_heads of 64 / v_heads."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=v_heads,
        linear_key_head_dim=16,
        linear_value_head_dim=64 // v_heads,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(3)
    return Qwen3NextGatedDeltaNet(config, 0).eval()


def taken_over(theirs, v_heads):
    """Our layer with the weights of theirs, which lays q, k, v, gate side by side per key head."""
    layer = build(v_heads=v_heads)
    per_head = theirs.in_proj_qkvz.weight.view(2, -1, 32)
    q, k, v, gate = (x.flatten(0, 1) for x in per_head.split((16, 16, 32, 32), 1))
    beta, rate = (x.flatten(0, 1) for x in theirs.in_proj_ba.weight.view(2, -1, 32).chunk(2, 1))
    copies = {
        "qkv.weight": torch.cat((q, k, v)),
        "convs.weight": theirs.conv1d.weight[:, 0],
        "beta.weight": beta,
        "rate.weight": rate,
        "log_a": theirs.A_log,
        "rate_bias": theirs.dt_bias,
        "readout.norm.weight": theirs.norm.weight,
        "readout.gate.weight": gate,
        "readout.out.weight": theirs.out_proj.weight,
    }
    layer.load_state_dict(copies)
    return layer


@pytest.mark.parametrize("v_heads", [2, 4])
def test_equals_the_layer_of_transformers(v_heads):
    theirs, x = qwen(v_heads), tokens(90)
    with torch.no_grad():
        want = theirs(x)
        got = taken_over(theirs, v_heads)(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert want.std() > 0.05


@pytest.mark.parametrize("strength", [0.1, 80.0])
def test_equals_the_functions_of_transformers_for_weak_and_strong_decay(strength):
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        torch_recurrent_gated_delta_rule,
    )

    made = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 90, 16, generator=made)
    q, k = (torch.nn.functional.normalize(y, dim=-1) for y in (q, k))
    decay, beta = torch.rand(2, 2, 4, 90, generator=made)
    decay, beta = -strength * decay, 2 * beta
    got, state = ops.scan(q, k, v, decay=decay, beta=beta)
    want, last = torch_recurrent_gated_delta_rule(
        *(y.transpose(1, 2) for y in (q, k, v)),
        g=decay.mT,
        beta=beta.mT,
        initial_state=None,
        output_final_state=True,
    )
    torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-4)


def test_without_decay_it_is_deltanet():
    gated, plain, x = build(), build("deltanet", gate=True), tokens(40)
    weights = gated.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    with torch.no_grad():
        assert not torch.allclose(gated(x), plain(x), atol=1e-3)
        gated.log_a.fill_(-torch.inf)
        torch.testing.assert_close(gated(x), plain(x), atol=1e-6, rtol=1e-5)


def test_value_heads_of_a_group_read_with_the_same_query():
    layer, x = build(v_heads=6, expand_v=3.0), tokens(20)
    with torch.no_grad():
        layer.qkv.weight[64:].copy_(layer.qkv.weight[64:80].repeat(6, 1))
        layer.convs.weight[64:].copy_(layer.convs.weight[64:80].repeat(6, 1))
        for name in ("log_a", "rate_bias"):
            getattr(layer, name).fill_(0.1)
        for part in (layer.beta, layer.rate):
            part.weight.copy_(part.weight[:1].expand(6, -1))
        seen = {}
        layer.readout.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
        layer(x)
    heads = seen["heads"]
    torch.testing.assert_close(heads[:, 0], heads[:, 2])
    torch.testing.assert_close(heads[:, 3], heads[:, 5])
    assert not torch.allclose(heads[:, 2], heads[:, 3], atol=1e-3)


def test_decays_before_it_corrects():
    made = torch.Generator().manual_seed(0)
    start = torch.randn(1, 1, 4, 3, generator=made).double()
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 4, generator=made).double(), dim=-1)
    v, beta = torch.randn(1, 1, 1, 3, generator=made).double(), torch.full((1, 1, 1), 0.6).double()
    decay = torch.full((1, 1, 1), 0.5).double().log()
    _, state = ops.scan(k, k, v, decay=decay, beta=beta, state=start)
    kept = start / 2
    want = kept + 0.6 * k.mT @ (v - k @ kept)
    torch.testing.assert_close(state, want)
    read, _ = ops.scan(k, k, v, decay=decay, beta=torch.ones_like(beta), state=start)
    torch.testing.assert_close(read, v / 2)
    _, left = ops.scan(k, k, v, decay=decay, beta=torch.zeros_like(beta), state=start)
    torch.testing.assert_close(left, kept)


def test_keys_of_nothing_write_nothing_and_give_no_wild_gradient():
    from foveate.nn.linear._delta import unit

    x = torch.zeros(3, requires_grad=True)
    unit(x).sum().backward()
    assert torch.equal(unit(x), torch.zeros(3)) and x.grad.abs().max() <= 1001
    torch.testing.assert_close(unit(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"v_heads": 3}, "v_heads must be a multiple of heads, got 3 and 2"),
        ({"expand_k": 0.3}, "times 0.3 must be a multiple of heads"),
        ({"v_heads": 0}, "v_heads must be at least 1"),
    ],
)
def test_refuses_sizes_that_do_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_rows_of_its_claim_ask_for_the_value_that_was_written_last():
    from foveate.bench.claims.linear.gated_deltanet import _overwritten

    rows = _overwritten(5, seed=0)
    assert rows.inputs.shape == (5, 48) and bool((rows.mask.sum(1) == 8).all())
    changed = 0
    for tokens_of_row, targets, asked in zip(*rows, strict=True):
        for at in asked.nonzero()[:, 0]:
            before = (tokens_of_row[:32] == tokens_of_row[at]).nonzero()[:, 0]
            assert len(before) == 2 and tokens_of_row[before[1] + 1] == targets[at]
            changed += int(tokens_of_row[before[0] + 1] != targets[at])
    assert changed > 30
