"""RALA (2024, paper 255): the rank of what linear attention gives, and what raises it."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate import ops
from foveate.bench.claims import Outcome
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._planar import tokens_of
from foveate.nn.linear.rala import RALA, key_weights

CLAIM = "weighted keys and gated outputs have a higher rank than those of plain linear attention"

_WIDTH, _HEADS, _SIDE = 64, 4, 14


@torch.inference_mode()
def measure() -> Outcome:
    """Smooth random maps of 14 × 14 cells, 64 channels in 4 heads, untrained layers.

    The rank counts singular values above a thousandth of the largest, the mean over 8 maps; of the
    context (keys times values) of a head, and of the outputs of all.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = RALA(_WIDTH, _HEADS, theta=None, conv=0)
        coarse = torch.randn(8, _WIDTH, 5, 5)
    x = torch.nn.functional.interpolate(coarse, (_SIDE, _SIDE), mode="bicubic")
    q, k, v, o = layer.qkvo(tokens_of(x)).chunk(4, -1)
    fq, fk = (ops.feature_map("elu1")(heads_of(y, layer.width)) for y in (q, k))
    values = heads_of(v, layer.width)
    weighted = fk * key_weights(fq, fk)[..., None]
    plain, mine = (
        joined_heads(ops.linear_attention_global(fq, keys, values)) for keys in (fk, weighted)
    )
    figures = {
        "rank of the context, plain": _rank(fk.mT @ values),
        "rank of the context, weighted keys": _rank(weighted.mT @ values),
        "rank of outputs, plain": _rank(plain),
        "rank of outputs, weighted keys": _rank(mine),
        "rank of outputs, gated too": _rank(mine * o),
    }
    first, second, *outputs = figures.values()
    return Outcome(
        figures,
        second > first and outputs[0] < outputs[1] < outputs[2],
        "untrained, weights of keys promise no rank; the gate does",
    )


def _rank(x: Tensor) -> float:
    """Mean number of singular values above a thousandth of the largest."""
    values = torch.linalg.svdvals(x)
    return float((values > 1e-3 * values[..., :1]).sum(-1).float().mean())
