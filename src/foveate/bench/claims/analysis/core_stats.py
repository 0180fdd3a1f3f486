"""Rank collapse: what attention alone does to tokens, with depth and with skips."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from foveate import ops
from foveate.analysis.core_stats import of_stream
from foveate.bench.claims import Outcome

CLAIM = "attention alone makes all tokens one, ever faster with depth; causality and skips slow it"

_TOKENS, _DIM, _HEADS, _LAYERS = 32, 64, 4, 12


def measure() -> Outcome:
    """Twelve random layers of attention only, on random tokens in float64."""
    ways = {
        "both ways": _depths(causal=False, skip=False),
        "causal": _depths(causal=True, skip=False),
        "both ways, skips": _depths(causal=False, skip=True),
    }
    figures = {
        f"{name}, {depth} layers": ways[name][depth]
        for name, depths in (("both ways", (1, 2, 3)), ("causal", (3, 12)))
        for depth in depths
    }
    figures["both ways, skips, 12 layers"] = ways["both ways, skips"][12]
    pure = ways["both ways"]
    shares = [after / before for before, after in pairwise(pure[:4])]
    faster = shares[0] > shares[1] > shares[2]
    slower = ways["causal"][3] > pure[3] and ways["both ways, skips"][12] > pure[3]
    return Outcome(figures, faster and slower)


def _depths(*, causal: bool, skip: bool) -> list[float]:
    """The rank that is left, ‖X - mean‖ / ‖X‖, after 0 … 12 layers."""
    made = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    x = drawn(_TOKENS, _DIM)
    left = [float(of_stream(x)["collapse"])]
    for _ in range(_LAYERS):
        weights = drawn(4, _DIM, _DIM) / _DIM**0.5
        normed = x / x.square().mean(-1, keepdim=True).sqrt()
        streams = (normed, normed, x)
        q, k, v = (
            (s @ w).unflatten(1, (_HEADS, -1)).transpose(0, 1)[None]
            for s, w in zip(streams, weights, strict=False)
        )
        out = ops.attend(q, k, v, causal=causal)[0].transpose(0, 1).flatten(1)
        out = out @ weights[3]
        x = x + out if skip else out
        left.append(float(of_stream(x)["collapse"]))
    return left
