"""Faster neighborhood attention (2024, paper 142): tiles instead of gathered neighborhoods."""

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.sparse.fna import FNA
from foveate.bench.claims import Outcome
from foveate.bench.claims._grids import times_faster, tokens

CLAIM = "in tiles, neighborhood attention beats gathered neighborhoods and masked dense attention"

_SIDE, _WINDOW = 56, 7


def measure() -> Outcome:
    """Times on a grid of 56 x 56 with windows of 7 x 7, all three held to the same result."""
    q, k, v = tokens(_SIDE**2)
    made = FNA(shape=(_SIDE, _SIDE), window=_WINDOW, tile=(8, 8))
    mask = ops.neighborhood((_SIDE, _SIDE), _WINDOW)
    seen = mask.to_dense(_SIDE**2, _SIDE**2)[0, 0].nonzero()[:, 1].view(-1, _WINDOW**2)

    def tiled() -> Tensor:
        return made(q, k, v, causal=False)

    def gathered() -> Tensor:
        logits = torch.einsum("bhld,bhlnd->bhln", q, k[:, :, seen]) * q.shape[-1] ** -0.5
        return torch.einsum("bhln,bhlnd->bhld", logits.softmax(-1), v[:, :, seen])

    def dense() -> Tensor:
        return ops.attend(q, k, v, mask=mask)

    gap = max(float((tiled() - other()).abs().max()) for other in (gathered, dense))
    figures = {
        "times faster than gathered": times_faster(gathered, tiled),
        "times faster than masked dense": times_faster(dense, tiled),
        "largest difference": gap,
    }
    return Outcome(figures, min(list(figures.values())[:2]) > 1 and gap < 1e-4)
