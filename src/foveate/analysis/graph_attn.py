"""Attention Mechanisms Perspective: Graph-Structured Data in LLMs (2025, paper 34)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate import ops
from foveate.analysis._prompts import Prompt
from foveate.analysis.base import Record, describe
from foveate.hf.parts import run
from foveate.hf.watch import Seen, watch
from foveate.ops import Mask
from foveate.registry import Card, register


class Graph(Protocol):
    """A prompt that tells a graph: adjacency, hops (-1: no path), and the node of each mention."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def adjacency(self) -> Tensor: ...
    @property
    def hops(self) -> Tensor: ...
    @property
    def mentioned(self) -> Tensor: ...
    @property
    def control(self) -> Graph | None: ...


def nodes_of(graph: Graph) -> Tensor:
    """The node that every token (L,) of a prompt mentions, -1 where it is other text."""
    out = torch.full((graph.prompt.ids.shape[1],), -1)
    for i, node in enumerate(graph.mentioned.tolist()):
        a, b = graph.prompt.spans[f"mention {i}"]
        out[a:b] = node
    return out


def hop_window(nodes: Tensor, hops: Tensor, k: int | None) -> Mask:
    """A causal mask by which mentions of nodes see text, and mentions of nodes within k hops.

    nodes (L,) or (B, L) hold the node of every token, -1 for text, which sees all before it; hops
    (nodes, nodes) or (B, nodes, nodes) the lengths of shortest paths, 0 for a node itself and -1
    where there is no path, which only k None, plain causality, lets pass. ValueError for k < 0.
    """
    if k is None:
        return ops.causal()
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    nodes, hops = (x if x.dim() == dims else x[None] for x, dims in ((nodes, 2), (hops, 3)))
    near = torch.nn.functional.pad((hops >= 0) & (hops <= k), (1, 0, 1, 0), value=True)

    def predicate(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        table = nodes.to(q.device) + 1
        end = table.shape[1] - 1
        u, v = (table[b % len(table), at.clamp(0, end)] for at in (q, key))
        return near.to(q.device)[b % len(near), u, v]

    batch = max(len(nodes), len(near))
    return ops.causal() & Mask(predicate, batch=batch, name=f"hop_window({k})")


def area(scores: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve (…) of scores (…, n), positive (n,) bool; 1/2 is chance."""
    above = scores[..., positive, None] - scores[..., None, ~positive]
    return ((above > 0).float() + 0.5 * (above == 0).float()).mean((-2, -1))


@register(
    Card(
        name="graph_attn",
        title="Attention Mechanisms Perspective: Exploring LLM Processing of Graph-Structured Data",
        year=2025,
        paper=34,
        claim="weights between nodes of a graph told in text do not follow its edges",
        kind="analysis",
        family="analysis",
        pretrained="exact",
        cost="two passes for every graph, each with a further attention pass",
        confidence="medium",
    )
)
@dataclass(frozen=True, kw_only=True)
class GraphAttn:
    """Whether the weights between nodes, listed once more after all edges, follow the edges.

    The weight of a pair is the mean over the tokens of the later and of the earlier node. By head,
    as means over graphs: `auc` of these weights for edges against other pairs, `control` the same
    for shuffled edges that the model was not told, `follows` the correlation of the change of
    weights and of edges when it is told the shuffled ones, `node` and `text` the mass of the
    listed nodes on mentions and on other text; `by hops` (layer, head, hop) is the mean weight of
    pairs at 1, 2, … `hops` steps, NaN where there is none.
    """

    hops: int = 4

    def __post_init__(self) -> None:
        ops.check_block("hops", self.hops)

    @torch.no_grad()
    def __call__(self, model: Any, graphs: Sequence[Graph]) -> Record:
        """Of a model on graphs with controls and the span "node v" of every node in their list.

        Raises ValueError for a graph without control, or none at all.
        """
        if not graphs:
            raise ValueError("wanted at least one graph, got none")
        found: dict[str, list[Tensor]] = {}
        by_hops, pairs = [], []
        for i, graph in enumerate(graphs):
            if graph.control is None:
                raise ValueError(f"every graph must have a control, graph {i} has none")
            maps, mass = node_maps(model, graph)
            told, _ = node_maps(model, graph.control)
            later, earlier = torch.tril_indices(len(graph.hops), len(graph.hops), -1)
            edge, other = (x.adjacency[later, earlier] for x in (graph, graph.control))
            weights, moved = maps[..., later, earlier], told[..., later, earlier]
            own = {
                "auc": area(weights, edge),
                "control": area(weights, other),
                "follows": _correlation(moved - weights, other.float() - edge.float()),
                "node": mass[..., 0],
                "text": mass[..., 1],
            }
            for name, value in own.items():
                found.setdefault(name, []).append(value)
            at = torch.stack([graph.hops[later, earlier] == k + 1 for k in range(self.hops)], 1)
            by_hops.append(weights @ at.float())
            pairs.append(at.sum(0))
        values = {name: torch.stack(rows).mean(0) for name, rows in found.items()}
        values["by hops"] = torch.stack(by_hops).sum(0) / torch.stack(pairs).sum(0)
        axes = {name: ("layer", "head", "hop")[: x.dim()] for name, x in values.items()}
        about = describe(model, graphs=len(graphs), **asdict(self))
        return Record("graph_attn", values, axes, "auc", about)


def node_maps(model: Any, graph: Graph) -> tuple[Tensor, Tensor]:
    """Weights (layer, head, node, node) between listed nodes, and their mass (layer, head, 2).

    The mass is that on mentions of nodes, and that on other text.
    """
    spans = [graph.prompt.spans[f"node {v}"] for v in range(len(graph.hops))]
    listed = torch.zeros(graph.prompt.ids.shape[1], len(spans))
    for v, (a, b) in enumerate(spans):
        listed[a:b, v] = 1 / (b - a)
    mention = (nodes_of(graph) >= 0).float()
    u = torch.cat((listed, torch.stack((mention, 1 - mention), 1)), 1)[None, None]
    maps: list[Tensor] = []

    def attention(seen: Seen) -> None:
        maps.append(torch.einsum("lv,hlm->hvm", listed, seen.row_stats(u).means[0].float()))

    with watch(model, attention=attention):
        run(model, graph.prompt.ids)
    whole = torch.stack(maps)
    return whole[..., :-2], whole[..., -2:].mean(-2)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation (…) of x (…, n) with y (n,); 0 where one is constant."""
    x, y = x - x.mean(-1, keepdim=True), y - y.mean()
    return (x @ y) / (x.norm(dim=-1) * y.norm()).clamp_min(1e-30)
