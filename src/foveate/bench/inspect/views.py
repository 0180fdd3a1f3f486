"""What a page shows of a head: its block map, where it looks by distance, and in the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from foveate.analysis._columns import column_means
from foveate.analysis.base import Head
from foveate.hf.ablate import by_layer
from foveate.hf.parts import run
from foveate.hf.watch import Seen, watch

# Cells of a block map along a side, sampled rows of a profile, tokens named of a head, keys kept
# of a row, weights held at once.
CELLS, _ROWS, TOP_TOKENS, TOP_KEYS, _PAIRS = 32, 128, 8, 4, 1 << 22


class Views(NamedTuple):
    """What a pass shows of all heads (layer, head, …) and of the stream.

    maps (…, n, n): share of the weight of each of n blocks of rows that is on each of n blocks of
    keys; profiles (…, bins): share at distances 0, 1, 2-3, 4-7, …; columns (…, L): mean weight of
    every token over the rows that see it; streams (layers + 1, L): norms of what enters each block
    and leaves the last.
    """

    maps: Tensor
    profiles: Tensor
    columns: Tensor
    streams: Tensor


@torch.inference_mode()
def views(model: Any, ids: Tensor) -> Views:
    """Views of all heads on token ids (1, L)."""
    length = ids.shape[1]
    cells = min(CELLS, length)
    block = torch.arange(length) * cells // length
    members = one_hot(block, cells).float()
    bins = distances(length)
    found: dict[str, list[Tensor]] = {"maps": [], "profiles": [], "columns": [], "streams": []}

    def attention(seen: Seen) -> None:
        by_block = seen.row_stats(members[None, None]).means[0]
        found["maps"].append(members.T @ by_block / members.sum(0)[:, None])
        found["columns"].append(column_means(seen)[0])
        found["profiles"].append(_profile(seen, bins))

    def entering(layer: int, x: Tensor) -> None:
        found["streams"].append(x[0].float().norm(dim=-1))

    def leaving(layer: int, x: Tensor) -> None:
        if layer == parts.layers - 1:
            entering(layer, x)

    with watch(model, attention=attention, block_in=entering, block_out=leaving) as parts:
        run(model, ids)
    return Views(*(torch.stack(found[name]) for name in Views._fields))


def redundancy(maps: Tensor) -> Tensor:
    """The largest cosine of every head's map (layers, heads, n, n) with that of another head."""
    flat = torch.nn.functional.normalize(maps.flatten(2).flatten(0, 1), dim=-1)
    alike = flat @ flat.T
    alike.fill_diagonal_(0)
    return alike.amax(-1).view(maps.shape[:2])


class Looks(NamedTuple):
    """Of some heads and every token the keys it looks at most, (heads, L, k), and the weights."""

    heads: list[Head]
    keys: Tensor
    weights: Tensor


@torch.inference_mode()
def looks(model: Any, ids: Tensor, heads: Sequence[Head]) -> Looks:
    """Where every token looks in chosen heads: the largest weights of each row, no map held."""
    chosen, length = by_layer(heads), ids.shape[1]
    kept = min(TOP_KEYS, length)
    found: dict[Head, tuple[Tensor, Tensor]] = {}

    def attention(seen: Seen) -> None:
        own = chosen.get(seen.layer)
        if own is None:
            return
        step = max(1, _PAIRS // (seen.q.shape[1] * length))
        parts = [seen.rows(at)[0, own].topk(kept) for at in torch.arange(length).split(step)]
        weights, keys = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        found.update({(seen.layer, h): (keys[i], weights[i]) for i, h in enumerate(own)})

    with watch(model, attention=attention):
        run(model, ids)
    keys, weights = (torch.stack([found[h][i] for h in heads]) for i in (0, 1))
    return Looks(list(heads), keys, weights)


def distances(length: int) -> list[int]:
    """Where the bins of distances begin: 0, 1, 2, 4, 8, …"""
    return [0, *(2**i for i in range(math.ceil(math.log2(max(length, 2)))))]


def _profile(seen: Seen, bins: Sequence[int]) -> Tensor:
    """Mean weight (Hq, bins) by distance, on rows evenly spaced."""
    length = seen.q.shape[2]
    at = torch.linspace(0, length - 1, min(_ROWS, length)).round().long().unique()
    distance = (at[:, None] - torch.arange(length)).abs()
    member = torch.bucketize(distance, torch.tensor(bins), right=True) - 1
    total = torch.zeros(seen.q.shape[1], len(bins))
    for rows, own in zip(at.split(16), member.split(16), strict=True):
        weights = seen.rows(rows)[0].flatten(1)
        total.index_add_(1, own.flatten(), weights)
    return total / len(at)
