"""Flow-Attention (2022, paper 25): whether keys that compete are told apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate import ops
from foveate.bench.claims import Outcome
from foveate.nn._attention import heads_of
from foveate.nn.linear.flow import flow_attention
from foveate.registry import create
from foveate.tasks.train import fit

CLAIM = "keys that compete get weights further from uniform than those of plain linear attention"

_LENGTH, _NOISE, _WIDTH, _HEADS, _STEPS = 128, 30, 32, 2, 200


@torch.inference_mode()
def measure() -> Outcome:
    """One layer learns which of two tokens is among 127 of noise, then what its weights are."""
    figures: dict[str, float] = {}
    for name in ("flow", "linattn"):
        with torch.inference_mode(False):
            model = _trained(name)
        ids, labels = _rows(400, 100_000)
        right = (model(ids).argmax(-1) == labels).float().mean()
        figures[f"accuracy, {name}"] = float(right)
        figures[f"entropy of weights, {name}"] = _entropy(model, ids[:50])
    figures["entropy of uniform weights"] = float(torch.tensor(_LENGTH).log())
    mine, plain = (figures[f"entropy of weights, {name}"] for name in ("flow", "linattn"))
    if min(figures["accuracy, flow"], figures["accuracy, linattn"]) < 0.75:
        return Outcome(figures, None, "a model did not learn the task in so few steps")
    return Outcome(figures, mine < plain)


class _Finder(nn.Module):
    """Embedding, one layer beside a skip, the mean over tokens, and two logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(_NOISE + 2, _WIDTH)
        self.layer = create(name, dim=_WIDTH, heads=_HEADS)
        self.head = nn.Linear(_WIDTH, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, 2) of ids (B, L)."""
        y: Tensor = self.head(self.layer(self.embed(ids), causal=False).mean(1))
        return y


def _trained(name: str) -> _Finder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Finder(name)

    def loss(step: int) -> Tensor:
        ids, labels = _rows(32, step)
        return cross_entropy(model(ids), labels)

    fit(model.parameters(), loss, steps=_STEPS, lr=1e-2)
    return model


def _rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with one of two tokens at a random place, and which of them it is."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, _NOISE + 2, (count, _LENGTH), generator=made)
    labels = torch.randint(2, (count,), generator=made)
    places = torch.randint(_LENGTH, (count,), generator=made)
    ids[torch.arange(count), places] = labels
    return ids, labels


def _entropy(model: _Finder, ids: Tensor) -> float:
    """Entropy of the weights of a query, in nats, the mean over queries and heads."""
    layer: Any = model.layer
    x = model.embed(ids)
    q, k = (heads_of(part(x), _WIDTH // _HEADS) for part in (layer.q, layer.k))
    each = torch.eye(_LENGTH).expand(*k.shape[:2], -1, -1)
    if layer.card.name == "flow":
        weights = flow_attention(q, k, each)
    else:
        fq, fk = layer.features(q, k)
        weights = ops.linear_attention_global(fq, fk, each)
    weights = weights / weights.sum(-1, keepdim=True)
    return float(torch.special.entr(weights).sum(-1).mean())
