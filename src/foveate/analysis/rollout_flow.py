"""Quantifying Attention Flow in Transformers (2020, paper 230)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.analysis._max_flow import Network
from foveate.analysis.base import Record, describe, stacked
from foveate.hf.parts import Inputs, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, nearest, register

FUSIONS = ("mean", "max", "min")
# The longest text whose flow is computed, and the capacity below which an edge is left out.
_FLOW_TOKENS, _LEAST = 64, 1e-6
# Rows of a map of all heads that are held at once.
_CHUNK = 64


def with_residual(
    p: Tensor, *, residual: float = 0.5, fusion: str = "mean", discard: float = 0.0
) -> Tensor:
    """One row-stochastic map (…, L, L) of a layer from its heads' weights (…, H, L, L).

    The heads' mean, maximum or minimum, without the share `discard` of its visible entries (the
    smallest), gets the identity at weight `residual`, and its rows are normalised.
    """
    return _with_residual(_fused(p, fusion), residual, discard)


def rollout(layers: Sequence[Tensor]) -> Tensor:
    """Relevance (…, L, L) of every input (column) for every output (row).

    layers (…, L, L) are maps as `with_residual` makes them, the first layer's first.
    """
    out = layers[0]
    for layer in layers[1:]:
        out = layer @ out
    return out


def max_flows(layers: Sequence[Tensor], row: int) -> Tensor:
    """The largest flow (L,) from output `row` to every input, the maps (L, L) being capacities."""
    depth, length = len(layers), layers[0].shape[-1]
    network = Network((depth + 1) * length)
    for i, layer in enumerate(layers):
        capacities = layer.tolist()
        for a, b in (layer > _LEAST).nonzero().tolist():
            network.add((i + 1) * length + a, i * length + b, capacities[a][b])
    source = depth * length + row
    return torch.tensor([network.max_flow(source, sink) for sink in range(length)])


@register(
    Card(
        name="rollout_flow",
        title="Quantifying Attention Flow in Transformers",
        year=2020,
        paper=230,
        claim="attention followed through all layers tells what matters better than one layer's",
        kind="analysis",
        family="analysis",
        patterns=("noncausal self", "causal self"),
        pretrained="exact",
        cost="rollout: a transposed pass a layer, queries and keys of all layers; flow: L² edges "
        "a layer, at most 64 tokens",
        confidence="high",
    )
)
@dataclass(frozen=True, kw_only=True)
class RolloutFlow:
    """How much every token of a text matters to its outputs `rows`, counted among real tokens.

    `rollout` (text, row, token) multiplies the layers' maps from layer `start` on, each with the
    skip at weight `residual`; its rows sum to 1. No map is made where the heads are fused by their
    mean and nothing is discarded, else one map (L, L) at a time. `raw` is the last layer's own
    fused attention, to compare with. With `flow` the largest flows, their sums scaled to 1, of
    texts of at most 64 tokens.
    """

    rows: tuple[int, ...] = (-1,)
    residual: float = 0.5
    fusion: str = "mean"
    discard: float = 0.0
    start: int = 0
    flow: bool = False

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {self.fusion!r}{nearest(self.fusion, FUSIONS)}")
        for name, share in (("residual", self.residual), ("discard", self.discard)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be in [0, 1), got {share}")
        if not self.rows:
            raise ValueError("rows must name at least one output, got none")

    @torch.no_grad()
    def __call__(self, model: Any, inputs: Inputs) -> Record:
        """Of a model on token ids (B, L), a tokenizer's batch or images.

        Raises IndexError for a row that a text has not or a start that the model has not,
        ValueError for flows of too long a text.
        """
        layers: list[Seen] = []
        with watch(model, attention=layers.append) as parts:
            run(model, inputs)
        one_hot = _one_hot(self.rows, layers[-1].real_rows)
        if self.flow and one_hot.shape[1] > _FLOW_TOKENS:
            raise ValueError(
                f"flow is for at most {_FLOW_TOKENS} tokens, got {one_hot.shape[1]}: "
                "rollout has no such limit"
            )
        if not 0 <= self.start < parts.layers:
            raise IndexError(f"start must be in [0, {parts.layers}), got {self.start}")
        relevance = one_hot
        for seen in reversed(layers[self.start :]):
            relevance = self._step_down(seen, relevance)
        found = {"rollout": relevance, "raw": self._pulled(layers[-1], one_hot)}
        if self.flow:
            found["flow"] = self._flows(layers[self.start :], one_hot)
        values = {name: stacked(list(x.transpose(1, 2))) for name, x in found.items()}
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(values, ("text", "row", "token"))
        return Record("rollout_flow", values, axes, about=describe(model, inputs, **asdict(self)))

    def _pulled(self, seen: Seen, u: Tensor) -> Tensor:
        """The fused map, transposed, times u (B, L, m)."""
        if self.fusion == "mean":
            return seen.columns(u[:, None]).mean(1)
        return _map(seen, self.fusion).transpose(1, 2) @ u

    def _step_down(self, seen: Seen, u: Tensor) -> Tensor:
        """Relevance (B, L, m) for the outputs of a layer as relevance for its inputs."""
        if self.fusion == "mean" and not self.discard:
            return self.residual * u + (1 - self.residual) * self._pulled(seen, u)
        return self._map_with_residual(seen).transpose(1, 2) @ u

    def _map_with_residual(self, seen: Seen) -> Tensor:
        return _with_residual(_map(seen, self.fusion), self.residual, self.discard)

    def _flows(self, layers: list[Seen], one_hot: Tensor) -> Tensor:
        """Flows (B, L, m) to the outputs of a one-hot (B, L, m), scaled to the sum 1."""
        maps = [self._map_with_residual(seen) for seen in layers]
        found = torch.zeros_like(one_hot)
        for text, row, output in one_hot.nonzero().tolist():
            found[text, :, output] = max_flows([m[text] for m in maps], row)
        return found / found.sum(1, keepdim=True)


def _one_hot(rows: Sequence[int], real: Tensor) -> Tensor:
    """Rows counted among the real tokens (B, L) of every text, as columns (B, L, n)."""
    out = torch.zeros(*real.shape, len(rows))
    for text, at in enumerate(x.nonzero()[:, 0] for x in real):
        for i, row in enumerate(rows):
            if not -len(at) <= row < len(at):
                raise IndexError(f"text {text} has {len(at)} tokens, no row {row}")
            out[text, at[row], i] = 1.0
    return out.to(real.device)


def _fused(p: Tensor, fusion: str) -> Tensor:
    """One map (…, L, L) of the heads' weights (…, H, L, L)."""
    if fusion == "mean":
        return p.mean(-3)
    return p.amax(-3) if fusion == "max" else p.amin(-3)


def _map(seen: Seen, fusion: str) -> Tensor:
    """The fused map (B, L, L) of a layer, from some rows of all heads at a time."""
    rows = torch.arange(seen.q.shape[2], device=seen.q.device)
    return torch.cat([_fused(seen.rows(some), fusion) for some in rows.split(_CHUNK)], 1)


def _with_residual(fused: Tensor, residual: float, discard: float) -> Tensor:
    if discard:
        flat = fused.flatten(-2)
        hidden = (flat == 0).sum(-1, keepdim=True)
        rank = flat.argsort(-1).argsort(-1) - hidden
        kept = rank >= (discard * (flat.shape[-1] - hidden)).long()
        fused = (flat * kept).view_as(fused)
    identity = torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)
    mixed = residual * identity + (1 - residual) * fused
    return mixed / mixed.sum(-1, keepdim=True).clamp_min(1e-30)
