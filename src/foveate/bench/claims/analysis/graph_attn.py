"""Graphs told in text: do the weights between nodes know the edges?"""

from __future__ import annotations

from foveate.analysis.graph_attn import GraphAttn
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded
from foveate.tasks.graph_text import graph_text

CLAIM = "the weights between the nodes of a graph told in text hardly follow its edges"

_GRAPHS = 12


def measure() -> Outcome:
    """The built-in model on graphs of 8 nodes, listed once more after all edges.

    The best head is the best of 270: that of edges which the model was not told is its measure.
    """
    model, tokenizer = loaded()
    record = GraphAttn()(model, graph_text(tokenizer, rows=_GRAPHS, seed=0))
    near, far = (record["by hops"][..., k].mean() for k in (0, 1))
    figures = {
        "mean area": float(record["auc"].mean()),
        "best head": float(record["auc"].max()),
        "best head, shuffled edges": float(record["control"].max()),
        "largest correlation of changes": float(record["follows"].max()),
        "weight at one hop over that at two": float(near / far),
        "mass of nodes on mentions": float(record["node"].mean()),
    }
    chance = abs(figures["mean area"] - 0.5) < 0.1
    gain = figures["best head"] - figures["best head, shuffled edges"]
    return Outcome(figures, chance and gain < 0.1)
