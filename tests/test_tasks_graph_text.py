import re
from collections import deque

import pytest
import torch

from foveate.tasks.graph_text import QUESTIONS, count_hops, graph_text, random_graph, shuffle_edges


@pytest.fixture(scope="module")
def tokenizer(builtin):
    return builtin[1]


def breadth_first(adjacency, start):
    far, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for other in adjacency[node].nonzero()[:, 0].tolist():
            if other not in far:
                far[other] = far[node] + 1
                queue.append(other)
    return [far.get(node, -1) for node in range(len(adjacency))]


def said(tokenizer, text, name):
    a, b = text.prompt.spans[name]
    return tokenizer.decode(text.prompt.ids[0, a:b])


def both(tokenizer, **options):
    for text in graph_text(tokenizer, **options):
        yield from (text, text.control)


def node(name):
    return int(name.removeprefix(" node "))


def test_hops_are_those_of_a_search_from_every_node():
    made = torch.Generator().manual_seed(0)
    seen = set()
    for density in (0.1, 0.2, 0.4, 0.9):
        for nodes in (4, 8, 16):
            graph = random_graph(nodes, density, made)
            hops = count_hops(graph)
            assert hops.tolist() == [breadth_first(graph, node) for node in range(nodes)]
            seen |= set(hops.flatten().tolist())
    assert {-1, 0, 1, 2, 3} <= seen


def test_random_graphs_are_simple_and_have_their_density():
    made = torch.Generator().manual_seed(1)
    graphs = torch.stack([random_graph(12, 0.3, made) for _ in range(300)])
    assert torch.equal(graphs, graphs.mT) and not graphs.diagonal(dim1=1, dim2=2).any()
    assert abs(float(graphs.float().mean()) - 0.3 * 11 / 12) < 0.01


def test_shuffled_edges_keep_every_degree():
    made = torch.Generator().manual_seed(2)
    changed = 0
    for _ in range(30):
        graph = random_graph(10, 0.3, made)
        control = shuffle_edges(graph, made)
        assert torch.equal(control.sum(0), graph.sum(0)) and torch.equal(control, control.T)
        assert not control.diagonal().any()
        changed += int((control & ~graph).sum() > 0.3 * graph.sum())
    assert changed >= 25
    star = torch.zeros(5, 5, dtype=torch.bool)
    star[0, 1:] = star[1:, 0] = True
    assert torch.equal(shuffle_edges(star, made), star)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("nodes", [8, 12])
def test_the_text_tells_the_graph(tokenizer, question, nodes):
    for text in both(tokenizer, rows=4, seed=0, nodes=nodes, question=question):
        told = text.prompt.text.split(" Question")[0].split(" The nodes are:")[0]
        edges = re.findall(r"node (\d+) is connected to node (\d+)\.", told)
        graph = torch.zeros(nodes, nodes, dtype=torch.bool)
        for a, b in edges:
            graph[int(a), int(b)] = graph[int(b), int(a)] = True
        assert torch.equal(graph, text.adjacency) and 2 * len(edges) == int(graph.sum())
        assert text.hops.tolist() == [breadth_first(graph, node) for node in range(nodes)]
        names = [said(tokenizer, text, f"mention {i}") for i in range(len(text.mentioned))]
        assert [node(name) for name in names] == text.mentioned.tolist()
        assert text.mentioned[:nodes].tolist() == list(range(nodes))
        assert len(names) == text.prompt.text.count(" node ")
        starts = [text.prompt.spans[f"mention {i}"][0] for i in range(len(names))]
        assert starts == sorted(starts)


def test_controls_have_the_same_degrees_and_tokens(tokenizer):
    for question in QUESTIONS:
        for text in graph_text(tokenizer, rows=4, seed=1, nodes=12, question=question):
            control = text.control
            assert torch.equal(control.adjacency.sum(0), text.adjacency.sum(0))
            assert control.prompt.ids.shape == text.prompt.ids.shape
            assert control.control is None
            if question != "nodes":
                assert said(tokenizer, control, "u") == said(tokenizer, text, "u")


def test_the_list_of_nodes_stands_after_all_edges(tokenizer):
    for text in both(tokenizer, rows=3, seed=0, question="nodes"):
        assert text.prompt.answer.numel() == 0
        listed = ", ".join(f"node {v}" for v in range(8))
        assert text.prompt.text.endswith(f" The nodes are: {listed}.")
        for v in range(8):
            assert said(tokenizer, text, f"node {v}") == f" node {v}"
            assert (
                text.prompt.spans[f"node {v}"]
                == (text.prompt.spans[f"mention {len(text.mentioned) - 8 + v}"])
            )


def test_labels_are_those_of_a_search(tokenizer):
    for text in both(tokenizer, rows=6, seed=0, question="edge"):
        u, v = (node(said(tokenizer, text, name)) for name in "uv")
        right = " yes" if breadth_first(text.adjacency, u)[v] == 1 else " no"
        assert tokenizer.decode(text.prompt.answer) == right
        assert {right, tokenizer.decode(text.prompt.wrong)} == {" yes", " no"}
    for text in both(tokenizer, rows=6, seed=0, question="distance", density=0.2):
        u, v = (node(said(tokenizer, text, name)) for name in "uv")
        assert int(tokenizer.decode(text.prompt.answer)) == breadth_first(text.adjacency, u)[v] > 0
    for text in both(tokenizer, rows=6, seed=0, question="neighbours"):
        far = breadth_first(text.adjacency, node(said(tokenizer, text, "u")))
        beside = [f"node {v}" for v in range(8) if far[v] == 1]
        assert tokenizer.decode(text.prompt.answer) == " " + ", ".join(beside)


def test_half_of_the_edges_asked_for_are_there(tokenizer):
    texts = graph_text(tokenizer, rows=10, seed=3, question="edge")
    assert [tokenizer.decode(text.prompt.answer) for text in texts] == [" yes", " no"] * 5


def test_seeds_reproduce_and_leave_the_global_generator_alone(tokenizer):
    before = torch.random.get_rng_state()
    one, two, other = (
        [text.prompt.text for text in both(tokenizer, rows=2, seed=s)] for s in (3, 3, 4)
    )
    assert one == two != other
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"nodes": 3}, "nodes must be at least 4, got 3"),
        ({"density": 0.0}, "density must be from 0.05 to 0.95, got 0.0"),
        ({"question": "colour"}, "one of nodes, edge, distance, neighbours, got 'colour'"),
    ],
)
def test_refuses_bad_input(tokenizer, options, says):
    with pytest.raises(ValueError, match=says):
        graph_text(tokenizer, **{"rows": 1, "seed": 0} | options)
