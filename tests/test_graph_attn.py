from dataclasses import replace

import pytest
import torch

import foveate
from attached import prompt
from foveate.analysis.graph_attn import GraphAttn, area, hop_window, node_maps, nodes_of
from foveate.tasks.graph_text import GraphText, count_hops
from foveate.tasks.prompt import Prompt
from test_watch import eager_maps
from tiny_models import build

PATH = torch.zeros(4, 4).bool()
for _a, _b in ((0, 1), (1, 2)):
    PATH[_a, _b] = PATH[_b, _a] = True
OTHER = PATH[[3, 1, 2, 0]][:, [3, 1, 2, 0]]


def told(adjacency, seed, control=None):
    """Text 0, 1; mentions of node 2 and 0; text; the list of four nodes of one or two tokens."""
    spans = {"mention 0": (2, 3), "mention 1": (3, 4)}
    ends = [(5, 7), (7, 8), (8, 10), (10, 11)]
    spans |= {f"mention {i + 2}": x for i, x in enumerate(ends)}
    spans |= {f"node {i}": x for i, x in enumerate(ends)}
    nothing = torch.tensor([])
    text = Prompt("", prompt(12, seed), nothing, spans, nothing)
    return GraphText(
        text, adjacency, count_hops(adjacency), torch.tensor([2, 0, 0, 1, 2, 3]), control
    )


def graph(seed):
    """A path of three nodes and a lonely one, and a control."""
    return told(PATH, seed, told(OTHER, seed + 9))


def test_area_of_perfect_random_and_inverted_scores():
    edge = torch.tensor([True, False, True, False, False])
    assert float(area(edge.float(), edge)) == 1
    assert float(area(-edge.float(), edge)) == 0
    assert float(area(torch.ones(5), edge)) == 0.5
    scores = torch.tensor([[3.0, 1.0, 1.5, 2.0, 0.0]])
    assert float(area(scores, edge)[0]) == pytest.approx(5 / 6)


def test_maps_between_nodes_are_means_of_the_models_own():
    model, one = build("llama"), graph(1)
    maps, mass = node_maps(model, one)
    spans = [one.prompt.spans[f"node {v}"] for v in range(4)]
    mention = nodes_of(one) >= 0
    assert nodes_of(one).tolist() == [-1, -1, 2, 0, -1, 0, 0, 1, 2, 2, 3, -1]
    for layer, p in enumerate(eager_maps(model, one.prompt.ids)):
        for u, (a, b) in enumerate(spans):
            for v, (c, d) in enumerate(spans):
                want = p[0, :, a:b, c:d].mean((1, 2))
                torch.testing.assert_close(maps[layer, :, u, v], want, rtol=1e-3, atol=1e-5)
        rows = torch.stack([p[0, :, a:b][..., mention].sum(-1).mean(1) for a, b in spans])
        torch.testing.assert_close(mass[layer, :, 0], rows.mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(mass.sum(-1), torch.ones(4, 4))


def test_record_is_of_pairs_that_later_nodes_see():
    model, one = build("llama"), graph(1)
    record = GraphAttn(hops=3)(model, [one])
    maps, _ = node_maps(model, one)
    pairs = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    weights = torch.stack([maps[..., u, v] for u, v in pairs], -1)
    edge = torch.tensor([True, False, True, False, False, False])
    torch.testing.assert_close(record["auc"], area(weights, edge))
    torch.testing.assert_close(record["by hops"][..., 0], weights[..., [0, 2]].mean(-1))
    torch.testing.assert_close(record["by hops"][..., 1], weights[..., 1])
    assert bool(record["by hops"][..., 2].isnan().all())
    assert float(record["follows"].abs().max()) <= 1 + 1e-5
    same = GraphAttn()(model, [replace(one, control=one)])
    assert float(same["follows"].abs().max()) == 0
    torch.testing.assert_close(same["control"], same["auc"])
    both = GraphAttn(hops=3)(model, [one, graph(2)])
    want = (record["auc"] + GraphAttn()(model, [graph(2)])["auc"]) / 2
    torch.testing.assert_close(both["auc"], want)


def test_windows_of_hops():
    one = graph(1)
    nodes, hops, causal = nodes_of(one), one.hops, torch.ones(12, 12).tril().bool()

    def seen(k, hops=hops):
        return hop_window(nodes, hops, k).to_dense(12, 12)[0, 0]

    assert torch.equal(seen(None), causal)
    connected = torch.ones(4, 4).long() - torch.eye(4).long()
    assert torch.equal(seen(1, connected), causal)
    assert not torch.equal(seen(2), causal)  # node 3 is out of reach of all others
    text = nodes < 0
    for k in (0, 1, 2):
        own = seen(k)
        assert torch.equal(own[text], causal[text])
        assert torch.equal(own[:, text], causal[:, text])
        for i in range(12):
            for j in range(i + 1):
                if not text[i] and not text[j]:
                    far = int(hops[nodes[i], nodes[j]])
                    assert bool(own[i, j]) == (0 <= far <= k)
    pair = hop_window(torch.stack((nodes, nodes)), torch.stack((hops, connected)), 1)
    dense = pair.to_dense(12, 12)
    assert torch.equal(dense[0, 0], seen(1)) and torch.equal(dense[1, 0], causal)


def test_attention_runs_under_a_window():
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    mask = hop_window(nodes_of(graph(1)), graph(1).hops, 1)
    logits = (q @ k.transpose(-1, -2)) * 8**-0.5
    want = logits.masked_fill(~mask.to_dense(12, 12), float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(foveate.ops.attend(q, k, v, mask=mask), want, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        hop_window(torch.zeros(3).long(), torch.zeros(1, 1).long(), -1)
    with pytest.raises(ValueError, match="hops must be at least 1"):
        GraphAttn(hops=0)
    with pytest.raises(ValueError, match="control, graph 0 has none"):
        GraphAttn()(build("llama"), [replace(graph(1), control=None)])
    with pytest.raises(ValueError, match="at least one graph"):
        GraphAttn()(build("llama"), [])
