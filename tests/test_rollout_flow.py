import itertools

import pytest
import torch

from attached import left_padded, prompt
from foveate.analysis._max_flow import Network
from foveate.analysis.rollout_flow import RolloutFlow, max_flows, rollout, with_residual
from test_watch import eager_maps, tiny_encoder
from tiny_models import build


def maps(layers=3, length=6, causal=False, heads=2):
    """Random maps (H, L, L) of some layers."""
    made = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(layers, heads, length, length, generator=made)
    if causal:
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    return list(logits.softmax(-1))


def test_rollout_is_stochastic_causal_and_nothing_for_identity():
    layers = [with_residual(p) for p in maps(causal=True)]
    relevance = rollout(layers)
    torch.testing.assert_close(relevance.sum(-1), torch.ones(6))
    assert float(relevance.triu(1).abs().max()) == 0
    torch.testing.assert_close(rollout(layers[:1]), layers[0])
    eye = torch.eye(6)[None]
    torch.testing.assert_close(rollout([with_residual(eye)] * 3), eye[0])


def test_fusions_and_discarding_the_smallest():
    p = maps(1)[0]
    for fusion, fused in (("mean", p.mean(0)), ("max", p.amax(0)), ("min", p.amin(0))):
        want = 0.5 * (fused + torch.eye(6))
        got = with_residual(p, fusion=fusion)
        torch.testing.assert_close(got, want / want.sum(-1, keepdim=True))
    kept = with_residual(p, residual=0.0, discard=0.5) > 0
    assert int(kept.sum()) == 18
    smallest = p.mean(0).flatten().argsort()[:18]
    assert not bool(kept.flatten()[smallest].any())
    causal = with_residual(maps(1, causal=True)[0], residual=0.0, discard=0.5) > 0
    assert int(causal.sum()) == 21 - 10


def test_the_largest_flow_is_the_smallest_cut():
    made = torch.Generator().manual_seed(0)
    for _ in range(20):
        room = torch.rand(6, 6, generator=made) * (torch.rand(6, 6, generator=made) < 0.6)
        network = Network(6)
        for a, b in room.nonzero().tolist():
            network.add(a, b, float(room[a, b]))
        cuts = []
        for inside in itertools.product((True, False), repeat=4):
            side = torch.tensor([True, *inside, False])
            cuts.append(float(room[side][:, ~side].sum()))
        assert network.max_flow(0, 5) == pytest.approx(min(cuts), abs=1e-6)
        assert network.max_flow(0, 5) == pytest.approx(min(cuts), abs=1e-6)


def test_flow_is_at_least_rollout_and_at_most_what_its_ends_hold():
    layers = [with_residual(p) for p in maps()]
    flows = torch.stack([max_flows(layers, row) for row in range(6)])
    assert bool((flows >= rollout(layers) - 1e-5).all())
    assert bool((flows <= layers[0].sum(0) + 1e-5).all()) and float(flows.max()) <= 1 + 1e-5
    torch.testing.assert_close(max_flows(layers[:1], 2), layers[0][2])


def test_flow_follows_its_tokens_when_they_change_places():
    layers, order = [with_residual(p) for p in maps()], torch.tensor([3, 0, 5, 1, 4, 2])
    moved = [x[order][:, order] for x in layers]
    want = max_flows(layers, int(order[1]))[order]
    torch.testing.assert_close(max_flows(moved, 1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"start": 2}, {"residual": 0.2}, {"fusion": "max"}, {"discard": 0.3}]
)
def test_without_maps_it_is_the_product_of_the_models_own_maps(options):
    model, ids = build("llama"), prompt(20)
    record = RolloutFlow(rows=(-1, 7), **options)(model, ids)
    own = {k: v for k, v in options.items() if k != "start"}
    layers = [with_residual(p[0], **own) for p in eager_maps(model, ids)]
    want = rollout(layers[options.get("start", 0) :])[[-1, 7]]
    torch.testing.assert_close(record["rollout"][0], want, rtol=1e-4, atol=1e-6)
    if not options:
        last = eager_maps(model, ids)[-1][0].mean(0)[[-1, 7]]
        torch.testing.assert_close(record["raw"][0], last, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_padded_texts_are_measured_as_alone(fusion):
    model, rows = build("llama"), (prompt(10, 1), prompt(7, 2))
    ids, mask = left_padded(*rows)
    measure = RolloutFlow(rows=(-1, 2), fusion=fusion, flow=True)
    both = measure(model, {"input_ids": ids, "attention_mask": mask})
    for i, row in enumerate(rows):
        alone = measure(model, row)
        for name in ("rollout", "raw", "flow"):
            got = both[name][i, :, 10 - row.shape[1] :]
            torch.testing.assert_close(got, alone[name][0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(both["rollout"][i].sum(-1), torch.ones(2))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders_are_measured_too(kind):
    model, inputs = tiny_encoder(kind)
    record = RolloutFlow(rows=(0,))(model, inputs)
    torch.testing.assert_close(record["rollout"].sum(-1), torch.ones(2, 1))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown fusion 'men'; did you mean 'mean'"):
        RolloutFlow(fusion="men")
    with pytest.raises(ValueError, match=r"discard must be in \[0, 1\), got 1"):
        RolloutFlow(discard=1.0)
    with pytest.raises(ValueError, match="rows must name at least one output"):
        RolloutFlow(rows=())
    with pytest.raises(IndexError, match="text 0 has 4 tokens, no row 4"):
        RolloutFlow(rows=(4,))(build("llama"), prompt(4))
    with pytest.raises(IndexError, match=r"start must be in \[0, 4\), got 4"):
        RolloutFlow(start=4)(build("llama"), prompt(4))
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        RolloutFlow(flow=True)(build("llama"), prompt(65))
