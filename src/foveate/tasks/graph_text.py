"""Graphs told in sentences.

"Attention Mechanisms Perspective: Exploring LLM Processing of Graph-Structured Data" (2025,
paper 34).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.tasks.batch import check_at_least, check_choice
from foveate.tasks.prompt import Piece, Prompt, draw, write

QUESTIONS = ("nodes", "edge", "distance", "neighbours")


@dataclass(frozen=True)
class GraphText:
    """A prompt about a graph.

    adjacency (nodes, nodes) bool, symmetric; hops (nodes, nodes) the length of a shortest path, -1
    where there is none; mentioned (m,) the node of each mention in the text, in order: mention i is
    the span "mention i". `control` is a graph of the same degrees whose edges are shuffled, told in
    as many tokens.
    """

    prompt: Prompt
    adjacency: Tensor
    hops: Tensor
    mentioned: Tensor
    control: GraphText | None = None


def graph_text(
    tokenizer: Any,
    *,
    rows: int,
    seed: int,
    nodes: int = 8,
    density: float = 0.3,
    question: str = "nodes",
) -> list[GraphText]:
    """Random graphs in text: the nodes, then every edge, then a question.

    Each pair of nodes is an edge with probability `density`. The question is one of
    "nodes": no question but the list of all nodes once more, for maps between mentions after all
    edges, with a span "node v" each; "edge": whether u is connected to v, yes in every second row;
    "distance": the number of steps between two that a path joins; "neighbours": the nodes connected
    to u, ascending. Spans: "mention i", and "u", "v" in the question. Chance is 1/2 for "edge".
    Graphs without an edge or without a pair that is none are drawn again. Raises ValueError for
    sizes out of range and unknown questions.
    """
    check_at_least(1, rows=rows)
    check_at_least(4, nodes=nodes)
    check_choice("question", question, QUESTIONS)
    if not 0.05 <= density <= 0.95:
        raise ValueError(f"density must be from 0.05 to 0.95, got {density}")
    made = torch.Generator().manual_seed(seed)
    return [_row(tokenizer, nodes, density, question, row % 2 == 0, made) for row in range(rows)]


def random_graph(nodes: int, density: float, made: torch.Generator) -> Tensor:
    """Adjacency (nodes, nodes) with each pair an edge with probability `density`."""
    above = (torch.rand(nodes, nodes, generator=made) < density).triu(1)
    return above | above.T


def shuffle_edges(adjacency: Tensor, made: torch.Generator) -> Tensor:
    """A graph of the same degrees: random pairs of edges exchange an end where that is possible."""
    shuffled = adjacency.clone()
    edges = adjacency.triu().nonzero().tolist()
    for _ in range(10 * len(edges)):
        i, j = torch.randint(len(edges), (2,), generator=made).tolist()
        (a, b), (c, d) = edges[i], edges[j][:: 1 if torch.rand((), generator=made) < 0.5 else -1]
        if len({a, b, c, d}) == 4 and not shuffled[a, d] and not shuffled[c, b]:
            for x, y, edge in ((a, b, False), (c, d, False), (a, d, True), (c, b, True)):
                shuffled[x, y] = shuffled[y, x] = edge
            edges[i], edges[j] = [a, d], [c, b]
    return shuffled


def count_hops(adjacency: Tensor) -> Tensor:
    """Length (nodes, nodes) of the shortest paths, breadth first; -1 where there is none."""
    reached = torch.eye(len(adjacency), dtype=torch.bool)
    hops = reached.long() - 1
    for step in range(1, len(adjacency)):
        reached = (reached.float() @ adjacency.float()) > 0
        hops[reached & (hops < 0)] = step
    return hops


def _row(
    tokenizer: Any, nodes: int, density: float, question: str, yes: bool, made: torch.Generator
) -> GraphText:
    """A graph with a pair to ask for, and its control."""
    apart = ~torch.eye(nodes, dtype=torch.bool)
    while True:
        graph = random_graph(nodes, density, made)
        control = shuffle_edges(graph, made)
        if question == "distance":
            pairs = (count_hops(graph) > 0) & (count_hops(control) > 0)
        else:
            pairs = graph if yes or question != "edge" else ~graph & apart
        if graph.any() and pairs.any() and not graph[apart].all():
            break
    ((u, v),) = draw(pairs.nonzero().tolist(), 1, made)
    told = (_tell(tokenizer, one, question, u, v, made) for one in (graph, control))
    return replace(next(told), control=next(told))


def _tell(
    tokenizer: Any, adjacency: Tensor, question: str, u: int, v: int, made: torch.Generator
) -> GraphText:
    """The graph in text, edges in random order and either direction, and the question."""
    hops = count_hops(adjacency)
    edges = draw(adjacency.triu().nonzero().tolist(), int(adjacency.sum()) // 2, made)
    backward = (torch.rand(len(edges), generator=made) < 0.5).tolist()
    told: list[str | tuple[int, str]] = ["The graph has", *_listing(len(adjacency), ""), "."]
    for edge, turned in zip(edges, backward, strict=True):
        a, b = edge[::-1] if turned else edge
        told += [(a, ""), " is connected to", (b, ""), "."]
    answer, wrong = "", list[str]()
    if question == "nodes":
        told += [" The nodes are:", *_listing(len(adjacency), "node {}"), "."]
    elif question == "edge":
        told += [" Question: Is", (u, "u"), " connected to", (v, "v"), "? Answer:"]
        answer, *wrong = (" yes", " no") if hops[u, v] == 1 else (" no", " yes")
    elif question == "distance":
        told += [" Question: How many steps is", (u, "u"), " from", (v, "v"), "? Answer:"]
        answer = f" {hops[u, v]}"
    else:
        told += [" Question: Which nodes are connected to", (u, "u"), "? Answer:"]
        answer = ",".join(f" node {w}" for w in (hops[u] == 1).nonzero()[:, 0].tolist())
    mentioned: list[int] = []
    pieces: list[Piece] = []
    for part in told:
        if isinstance(part, str):
            pieces.append(part)
            continue
        node, name = part
        names = (f"mention {len(mentioned)}", name)
        pieces.append((f" node {node}", *filter(None, names)))
        mentioned.append(node)
    prompt = write(tokenizer, pieces, answer, wrong=wrong)
    return GraphText(prompt, adjacency, hops, torch.tensor(mentioned))


def _listing(nodes: int, name: str) -> list[str | tuple[int, str]]:
    """Every node once, by commas."""
    listed: list[str | tuple[int, str]] = []
    for node in range(nodes):
        listed += [(node, name.format(node)), ","]
    return listed[:-1]
