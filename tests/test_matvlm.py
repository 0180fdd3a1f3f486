import pytest
import torch
from torch.nn.functional import cross_entropy

import foveate
from foveate.nn._attention import Projections
from foveate.nn._recurrent import State
from foveate.nn.linear.matvlm import MaTVLM, distillation_loss
from layer_checks import tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("matvlm", **{"dim": 32, "heads": 4, "kv_heads": 2} | options)


def weights(kv_heads=2, head_dim=8, seed=0):
    made = torch.Generator().manual_seed(seed)
    wide = 4 * head_dim
    sizes = ((wide, 32), (kv_heads * head_dim, 32), (kv_heads * head_dim, 32), (32, wide))
    return Projections(*(torch.randn(size, generator=made) / 6 for size in sizes))


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 8), (2, 8), (4, 8), (2, 12)])
def test_with_what_was_added_switched_off_it_is_linear_attention(kv_heads, head_dim):
    given, x = weights(kv_heads, head_dim), tokens(11)
    layer = MaTVLM.from_attention(given, 4)
    with torch.no_grad():
        layer.convs.activation = False
        layer.convs.weight.zero_()
        layer.convs.weight[:, -1] = 1.0
        layer.skip.zero_()
        layer.log_a.fill_(-200.0)
        layer.step_bias.fill_(float(torch.tensor(1.0).expm1().log()))
        _, mixed, step = layer.inner(x).split(layer.split, -1)
        start = State("matvlm", torch.zeros(2, dtype=torch.long))
        got, _, _ = layer.recurrence(mixed, 0 * step, None, start)
        q, k, v = (
            (x @ w.T).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for w in (given.q, given.k, given.v)
        )
        k, v = (y.repeat_interleave(4 // kv_heads, 1) for y in (k, v))
        want = ((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.out.weight.detach(), given.out)


def test_takes_over_a_layer_of_a_model(tiny_llama):
    old = tiny_llama.model.layers[0].self_attn
    given = Projections.of(old)
    layer = MaTVLM.from_attention(given, 4)
    gate, x, b, c, _ = layer.inner.weight.split((64, 32, 32, 64, 4))
    for mine, theirs in ((x, given.v), (b, given.k), (c, given.q), (layer.out.weight, given.out)):
        torch.testing.assert_close(mine.detach(), theirs)
    assert not torch.equal(gate[:32].detach(), given.v)


def test_the_state_is_square_in_the_width_of_a_head():
    _, state = build()(tokens(9), return_state=True)
    assert state.s.shape == (2, 4, 8, 8)


def test_the_loss_is_distance_and_divergence():
    made = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 2, 5, 32, generator=made)
    logits, wanted = torch.randn(2, 2, 5, 7, generator=made)
    got = distillation_loss([(a, b), (c, d)], logits, wanted)
    p = wanted.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    away = cross_entropy(logits.flatten(0, 1), p.flatten(0, 1)) - entropy
    apart = (a - b).square().sum().sqrt() + (c - d).square().sum().sqrt()
    torch.testing.assert_close(got, away + apart)
    assert distillation_loss([(a, a)], wanted, wanted).abs() < 1e-6


def test_the_distance_falls_in_training():
    given, x = weights(), tokens(20)
    layer = MaTVLM.from_attention(given, 4)
    want = foveate.create("softmax_attention", dim=32, heads=4, kv_heads=2)
    want.load(given)
    target = want(x).detach()
    zeros = torch.zeros(2, 20, 3)
    losses = []
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(30):
        loss = distillation_loss([(layer(x), target)], zeros, zeros)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) >= 0 and losses[-1] < 0.7 * losses[0]


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="heads must be a multiple of those of x: 4, 3"):
        build(kv_heads=3)
    with pytest.raises(ValueError, match="head_dim must be at least 1"):
        build(head_dim=0)
    odd = weights()._replace(k=torch.zeros(12, 32))
    with pytest.raises(ValueError, match="heads of 8 channels as the queries, got 12 and 16"):
        MaTVLM.from_attention(odd, 4)
    with pytest.raises(ValueError, match=r"differ: \(1, 2, 3\) and \(1, 2, 4\)"):
        distillation_loss([], torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
