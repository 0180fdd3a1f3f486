import pytest
import torch

import foveate
from foveate import ops
from foveate.nn.linear.flow import flow_attention, flow_attention_causal
from layer_checks import tokens

EPS = 1e-6


def build(seed=0, **options):
    torch.manual_seed(seed)
    return foveate.create("flow", **{"dim": 32, "heads": 4} | options)


def heads(queries, keys, seed=0):
    made = torch.Generator().manual_seed(seed)
    draw = {"generator": made, "dtype": torch.float64}
    q, k = (torch.randn(2, 3, n, 8, **draw) for n in (queries, keys))
    return q, k, torch.randn(2, 3, keys, 5, **draw)


def flows(q, k):
    """Incoming and outgoing flow, and both after conservation, one token at a time."""
    fq, fk = q.sigmoid(), k.sigmoid()

    def each(x, total):
        return torch.stack(
            [((x[:, :, i] + EPS) * (total + EPS)).sum(-1) for i in range(x.shape[2])], 2
        )

    incoming, outgoing = each(fq, fk.sum(2)), each(fk, fq.sum(2))
    into = each(fq, (fk / outgoing[..., None]).sum(2))
    out_of = each(fk, (fq / incoming[..., None]).sum(2))
    return incoming, outgoing, into, out_of


@pytest.mark.parametrize(("n", "m"), [(11, 11), (7, 15)])
@pytest.mark.parametrize("clamp", [0.7, 5.0])
def test_equals_the_definition_with_explicit_weights(n, m, clamp):
    q, k, v = heads(n, m)
    incoming, _, into, out_of = flows(q, k)
    competition = out_of.clamp(-clamp, clamp).softmax(-1) * m
    w = (q.sigmoid() / incoming[..., None]) @ k.sigmoid().mT * competition[:, :, None]
    want = torch.sigmoid(into * n / m)[..., None] * (w @ v)
    torch.testing.assert_close(flow_attention(q, k, v, clamp=clamp), want)


def test_flows_are_conserved():
    for n, m in ((40, 40), (20, 60)):
        q, k, _ = heads(n, m)
        incoming, _, into, out_of = flows(q, k)
        given = (q.sigmoid() / incoming[..., None]) @ k.sigmoid().mT
        torch.testing.assert_close(given.sum(-1), torch.ones_like(incoming), atol=1e-4, rtol=0)
        for flow, mean in ((out_of, n / m), (into, m / n)):
            torch.testing.assert_close(
                flow.mean(-1), torch.full_like(flow[..., 0], mean), atol=1e-4, rtol=0
            )


def test_causal_sums_are_those_of_every_prefix():
    q, k, v = heads(17, 17)
    fq, fk = q.sigmoid(), k.sigmoid()
    sources, sinks, raised = [], [], []
    weights = torch.zeros(2, 3, 17, 17, dtype=torch.float64)
    gate = torch.zeros(2, 3, 17, dtype=torch.float64)
    for t in range(17):
        c, to = t + 1, slice(t + 1)
        incoming = ((fq[:, :, t] + EPS) * (fk[:, :, to].sum(2) + EPS)).sum(-1, keepdim=True)
        outgoing = ((fk[:, :, t] + EPS) * (fq[:, :, to].sum(2) + EPS)).sum(-1, keepdim=True)
        sources.append(fk[:, :, t] * c / outgoing)
        sinks.append(fq[:, :, t] * c / incoming)
        into = ((fq[:, :, t] + EPS) * (sum(sources) + EPS)).sum(-1) / c
        out_of = ((fk[:, :, t] + EPS) * (sum(sinks) + EPS)).sum(-1) / c
        raised.append(out_of.clamp(-5, 5).exp())
        weights[:, :, t:, t] = (raised[t] / sum(raised) * c)[..., None]
        dots = (fq[:, :, t, None] / incoming[..., None] * fk).sum(-1)
        weights[:, :, t] *= dots
        gate[:, :, t] = into.sigmoid()
    want = gate[..., None] * (weights @ v)
    got, _ = flow_attention_causal(q, k, v)
    torch.testing.assert_close(got, want)


def test_without_order_a_token_is_where_its_input_is():
    layer, x = build().double(), tokens(30).double()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x[:, order], causal=False), layer(x, causal=False)[:, order]
        )
        context = tokens(40, seed=2).double()
        other = context[:, torch.randperm(40, generator=torch.Generator().manual_seed(1))]
        torch.testing.assert_close(
            layer(x, context=other, causal=False), layer(x, context=context, causal=False)
        )


def test_a_clamp_of_1_binds_half_of_the_keys():
    q, k, _ = heads(200, 200)
    *_, out_of = flows(q, k)
    share = float((out_of > 1).double().mean())
    assert 0.4 < share < 0.6 and out_of.max() < 5


def test_hidden_tokens_count_in_no_flow_and_in_no_number():
    q, k, v = heads(11, 11)
    valid = torch.arange(11).expand(2, -1) < 8
    part = flow_attention(q[:, :, :8], k[:, :, :8], v[:, :, :8])
    got = flow_attention(q, k, v, valid=valid, own=valid)
    torch.testing.assert_close(got[:, :, :8], part)
    part = flow_attention(q, k[:, :, :8], v[:, :, :8])
    torch.testing.assert_close(flow_attention(q, k, v, valid=valid), part)


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_that_a_mask_hides_changes_no_other(causal):
    layer, x = build().double(), tokens(20).double()
    hidden = torch.arange(20) % 3 == 1
    other = x.clone()
    other[:, hidden] *= -7
    mask = ops.padding(~hidden)
    with torch.no_grad():
        got = layer(other, causal=causal, mask=mask)
        torch.testing.assert_close(got[:, ~hidden], layer(x[:, ~hidden], causal=causal))
        context = tokens(25, seed=2).double()
        mask = ops.padding(torch.arange(25) < 19)
        got = layer(x, context=context, causal=False, mask=mask)
        torch.testing.assert_close(got, layer(x, context=context[:, :19], causal=False))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="clamp must be above 0, got 0"):
        build(clamp=0.0)
    with pytest.raises(ValueError, match="multiple of heads, got 5"):
        build(heads=5)
    layer, x = build(), tokens(5)
    with pytest.raises(ValueError, match="flow does not do causal cross-attention"):
        layer(x, context=x, causal=True)
