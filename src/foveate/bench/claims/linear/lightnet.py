"""LightNet (2024, paper 48): a map may be read row by row or column by column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from foveate import ops
from foveate.bench.claims import Outcome
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn.linear.lightnet import LightNet

CLAIM = (
    "tokens of a map get the same output whatever order they are read in, with decays they do not"
)

_ROWS, _COLUMNS, _WIDTH, _HEADS = 12, 16, 32, 4


@torch.inference_mode()
def measure() -> Outcome:
    """Random maps of 12 × 16 cells, read by rows and by columns: how far outputs are apart.

    Against it a linear recurrence over both directions whose state decays by 0.9 a token. Both
    distances are relative to the size of the outputs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = LightNet(_WIDTH, _HEADS, rank=8)
        x = torch.randn(4, _ROWS * _COLUMNS, _WIDTH)
    by_column = torch.arange(_ROWS * _COLUMNS).view(_ROWS, _COLUMNS).T.flatten()
    figures = {
        "distance, LightNet": _distance(lambda y: layer(y, causal=False), x, by_column),
        "distance, decay in both directions": _distance(
            lambda y: _decaying(layer, y), x, by_column
        ),
    }
    mine, decayed = figures.values()
    return Outcome(figures, mine < 1e-4 and decayed > 0.1)


def _distance(form: Callable[[Tensor], Tensor], x: Tensor, order: Tensor) -> float:
    """Of outputs in another order, put back, from those in the first."""
    want = form(x)
    return float((form(x[:, order]) - want[:, order]).norm() / want.norm())


def _decaying(layer: LightNet, x: Tensor) -> Tensor:
    """The same projections in a scan forth and one back, added."""
    q, k = (heads_of(silu(part(x)), layer.k_width) for part in (layer.q, layer.k))
    v = heads_of(layer.v(x), layer.v_width)
    decay = torch.full((_HEADS,), 0.9).log()
    forth, _ = ops.scan(q, k, v, decay=decay)
    back, _ = ops.scan(q.flip(2), k.flip(2), v.flip(2), decay=decay)
    return joined_heads(forth + back.flip(2))
