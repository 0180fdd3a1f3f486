import pytest
import torch

import foveate
from attached import prompt
from foveate import ops
from foveate.bench.linearize import divergence_of, transfer
from foveate.nn._attention import Projections
from foveate.nn.linear.hedgehog import FEATURES, FeatureMaps, Hedgehog, attention_transfer_loss
from layer_checks import heads_of, hidden_and_output, tokens


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("hedgehog", **{"dim": 32, "heads": 4, "kv_heads": 2} | options)


def phi(x, weight, bias, kind):
    """One head, token by token: x (B, L, K)."""
    width = x.shape[-1]
    rows = []
    for t in range(x.shape[1]):
        y = (x[:, t] * width**-0.25) @ weight.T + bias
        if kind == "exp":
            rows.append(torch.cat((y.exp(), (-y).exp()), -1))
        elif kind == "halves":
            rows.append(torch.cat((y.softmax(-1), (-y).softmax(-1)), -1))
        else:
            raised = torch.cat(((2 * y).exp(), (-2 * y).exp()), -1)
            rows.append(raised / raised.sum(-1, keepdim=True))
    return torch.stack(rows, 1)


def learned(layer):
    """Maps that are no longer the identity."""
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for maps in (layer.map_q, layer.map_k):
            for p in maps.parameters():
                p += 0.3 * torch.randn(p.shape, generator=made)
    return layer.double()


def explicit(layer, x, context, causal, theta, kind):
    """The output, weights made head by head."""
    first = max(context.shape[1] - x.shape[1], 0)
    q = heads_of(layer.q, x, 8, theta, first=first)
    k, v = heads_of(layer.k, context, 8, theta), heads_of(layer.v, context, 8)
    outs = []
    for h in range(4):
        fq = phi(q[:, h], layer.map_q.weight[h], layer.map_q.bias[h, 0], kind)
        fk = phi(k[:, h // 2], layer.map_k.weight[h // 2], layer.map_k.bias[h // 2, 0], kind)
        w = fq @ fk.mT
        w = w.tril(w.shape[2] - w.shape[1]) if causal else w
        assert w.min() >= 0
        outs.append(w / w.sum(-1, keepdim=True) @ v[:, h // 2])
    return layer.out(torch.cat(outs, -1))


@pytest.mark.parametrize("kind", list(FEATURES))
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition_head_by_head(kind, causal, cross):
    theta = None if kind == "exp" else 100.0
    layer = learned(build(features=kind, theta=theta))
    x = tokens(13).double()
    context = tokens(21, seed=2).double() if cross else x
    with torch.no_grad():
        want = explicit(layer, x, context, causal, theta, kind)
        got = layer(x, context=context if cross else None, causal=causal)
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-6)


def test_the_three_maps_are_three_functions():
    made = torch.Generator().manual_seed(0)
    q, k = 2 * torch.randn(2, 1, 1, 30, 8, generator=made, dtype=torch.float64)
    rows = {}
    for kind in FEATURES:
        maps = FeatureMaps(1, 8, kind).double()
        with torch.no_grad():
            w = maps(q) @ maps(k).mT
        rows[kind] = w / w.sum(-1, keepdim=True)
    for one, other in (("joint", "halves"), ("joint", "exp"), ("halves", "exp")):
        assert (rows[one] - rows[other]).abs().max() > 0.01


def test_a_factor_of_a_query_cancels_and_one_of_a_key_does_not():
    made = torch.Generator().manual_seed(0)
    fq, fk = torch.rand(2, 1, 1, 20, 6, generator=made, dtype=torch.float64)
    v = torch.randn(1, 1, 20, 4, generator=made, dtype=torch.float64)
    factor = 1 + torch.rand(20, 1, generator=made, dtype=torch.float64)
    plain, _ = ops.linear_attention_causal(fq, fk, v, eps=0)
    torch.testing.assert_close(ops.linear_attention_causal(fq * factor, fk, v, eps=0)[0], plain)
    assert (ops.linear_attention_causal(fq, fk * factor, v, eps=0)[0] - plain).abs().max() > 0.01


def test_the_loss_is_the_divergence_from_softmax_row_by_row():
    made = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, generator=made, dtype=torch.float64)
    k = torch.randn(2, 2, 9, 8, generator=made, dtype=torch.float64)
    fq = torch.rand(2, 4, 9, 6, generator=made, dtype=torch.float64)
    fk = torch.rand(2, 2, 9, 6, generator=made, dtype=torch.float64)
    found = []
    for b in range(2):
        for h in range(4):
            for t in range(9):
                p = (k[b, h // 2, : t + 1] @ q[b, h, t] / 8**0.5).softmax(0)
                r = fk[b, h // 2, : t + 1] @ fq[b, h, t]
                found.append((p * (p / (r / r.sum())).log()).sum())
    torch.testing.assert_close(attention_transfer_loss(q, k, fq, fk), torch.stack(found).mean())
    same = ops.grouped_logits(q, k, 8**-0.5).exp()
    ones = torch.eye(9, dtype=torch.float64).expand(2, 4, -1, -1)
    assert attention_transfer_loss(q, k.repeat_interleave(2, 1), same, ones).abs() < 1e-10


def window(made, turn):
    """Queries and keys that agree in two directions, each with others that the other lacks."""
    q, k = torch.randn(1, 4, 40, 8, generator=made), torch.randn(1, 2, 40, 8, generator=made)
    q[..., 5:], k[..., 2:5] = 0, 0
    return 2 * q @ turn, 2 * k @ turn


@pytest.mark.parametrize("kind", list(FEATURES))
def test_what_has_learned_is_nearer_to_softmax_than_before_and_than_elu(kind):
    made = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=made))[0]
    windows = [window(made, turn) for _ in range(8)]
    layer, elu = build(features=kind), ops.feature_map("elu1")
    before = divergence_of(layer, windows[6:])
    kept = {name: p.clone() for name, p in layer.named_parameters()}
    transfer(layer, windows[:6], steps=60, lr=5e-2, tell=lambda *x: None)
    plain = torch.stack([attention_transfer_loss(q, k, elu(q), elu(k)) for q, k in windows[6:]])
    after = divergence_of(layer, windows[6:])
    assert after < 0.6 * before and after < 0.6 * float(plain.mean())
    for name, p in layer.named_parameters():
        assert torch.equal(p, kept[name]) != name.startswith("map_")


def test_a_trained_layer_is_taken_over_with_its_projections(tiny_llama):
    layer, x, _ = hidden_and_output(tiny_llama, prompt(30))
    theta = tiny_llama.config.rope_parameters["rope_theta"]
    weights = Projections.of(layer)
    mine = Hedgehog.converted(weights, 4, theta=theta).double()
    for name, weight in weights._asdict().items():
        torch.testing.assert_close(mine.get_parameter(f"{name}.weight"), weight.double())
    with torch.no_grad():
        q = heads_of(mine.q, x.double(), 16, theta)
        k, v = heads_of(mine.k, x.double(), 16, theta), heads_of(mine.v, x.double(), 16)
        heads, sums = mine.summed(q[:, :, :20], k[:, :, :20], v[:, :, :20], None, None)
        rest, _ = mine.summed(q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], sums, None)
        want = mine.joined(torch.cat((heads, rest), 2))
        torch.testing.assert_close(mine(x.double()), want, atol=1e-6, rtol=1e-5)


def test_one_pass_keeps_a_state_of_kv_heads():
    layer = build()
    with torch.no_grad():
        _, state = layer(tokens(50), return_state=True)
    assert state.s.shape == (2, 2, 16, 8) and state.z.shape == (2, 2, 16)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"features": "relu"}, "features must be one of joint, halves, exp, got 'relu'"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads"),
        ({"heads": 5}, "multiple of heads, got 5"),
        ({"theta": 1.0, "head_dim": 7}, "of an even width, got 4 and 2 heads of 7"),
    ],
)
def test_refuses_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def test_refuses_masks_that_are_no_padding():
    layer, x = build(), tokens(6)
    with pytest.raises(ValueError, match="can only be masked by"):
        layer(x, mask=ops.window(3))
    with pytest.raises(ValueError, match="must not be longer than its context"):
        layer(x, context=x[:, :4], causal=True)
