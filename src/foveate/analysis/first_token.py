"""Why do LLMs attend to the first token? (2025, paper 178)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.analysis._columns import first_to_others, first_weight
from foveate.analysis.base import Record, describe, stacked
from foveate.hf.parts import Inputs, Parts, real_tokens, run
from foveate.hf.watch import Seen, watch
from foveate.ops import Mask
from foveate.registry import Card, register


@register(
    Card(
        name="first_token",
        title="Why do LLMs attend to the first token?",
        claim="looking at the first token keeps a change of one token from spreading to others",
        kind="analysis",
        family="analysis",
        year=2025,
        paper=178,
        pretrained="exact",
        cost="two passes, and one attention pass with one number for each query",
        confidence="medium",
    )
)
@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """How a change of tokens spreads through a model, and how much it looks at the first one.

    `spread`, by layer, text and position, is the relative change ‖x - x'‖ / ‖x‖ of the stream that
    leaves a layer. Over all rows but the first: `weight`, by layer and head, is the mean weight of
    the first real token, `sink` the share of the texts in which it exceeds `eps`. `value`, by kv
    head, is the norm of the first token's value over the mean of the others'. All in a model whose
    layers from `hidden_from` on do not see the first token (None: all do).
    """

    eps: float = 0.8
    hidden_from: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {self.eps}")

    @torch.no_grad()
    def __call__(self, model: Any, inputs: Inputs, changed: Inputs) -> Record:
        """Of texts and the same with some other tokens; ValueError where lengths differ."""
        real = real_tokens(inputs)
        if not torch.equal(real, real_tokens(changed)):
            raise ValueError("the changed texts must have the lengths and padding of the texts")
        if int(real.sum(1).min()) < 2:
            raise ValueError("first_token needs texts of at least 2 tokens")
        found: dict[str, list[Tensor]] = {}
        left: list[Tensor] = []

        def attention(seen: Seen) -> None:
            weight = first_weight(seen)
            value = first_to_others(seen.v.norm(dim=-1), seen.real_rows).mean(0)
            sink = (weight > self.eps).float().mean(0)
            for name, x in (("weight", weight.mean(0)), ("sink", sink), ("value", value)):
                found.setdefault(name, []).append(x)

        def keep(layer: int, x: Tensor) -> None:
            left.append(x)

        def compare(layer: int, x: Tensor) -> None:
            plain = left[layer]
            found.setdefault("spread", []).append(
                ((x - plain).norm(dim=-1) / plain.norm(dim=-1)) * real
            )

        start = Parts(model).layers if self.hidden_from is None else self.hidden_from
        with hide_first(model, start):
            with watch(model, attention=attention, block_out=keep):
                run(model, inputs)
            with watch(model, block_out=compare):
                run(model, changed)
        values = {name: stacked(rows) for name, rows in found.items()}
        heads = ("layer", "head")
        axes: dict[str, tuple[str, ...]] = {"weight": heads, "sink": heads}
        axes |= {"value": ("layer", "kv_head"), "spread": ("layer", "text", "position")}
        about = describe(model, inputs, eps=self.eps, hidden_from=self.hidden_from)
        return Record("first_token", values, axes, "weight", about)


@contextmanager
def hide_first(model: Any, start: int) -> Iterator[None]:
    """Hide the key of a text's first token from all other tokens in the layers from `start` on.

    Raises ValueError for a start below 0.
    """
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")

    def attention(seen: Seen) -> None:
        if seen.layer >= start:
            hidden = _not_first(seen.real_rows.int().argmax(1))
            seen.mask = hidden if seen.mask is None else seen.mask & hidden

    with watch(model, attention=attention):
        yield


def _not_first(first: Tensor) -> Mask:
    """All but the first tokens, at positions first (B,), which are seen by themselves."""

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k != first[b]) | (q == k)

    return Mask(predicate, batch=len(first), name="not first")


def mixing(model: Any, inputs: Inputs, *, position: int = -1, probes: int = 4) -> Tensor:
    """Norms ‖∂x_i/∂e_j‖ (B, L) of the stream after the last block at a position by embeddings.

    An estimate of the Frobenius norm from `probes` random directions, always the same.
    """
    ops.check_block("probes", probes)
    held: dict[str, Tensor] = {}

    def block_in(layer: int, x: Tensor) -> Tensor | None:
        if layer:
            return None
        held["in"] = x.detach().requires_grad_()
        return held["in"]

    def block_out(layer: int, x: Tensor) -> None:
        held["out"] = x

    with torch.enable_grad(), watch(model, block_in=block_in, block_out=block_out):
        run(model, inputs)
    out = held["out"][:, position]
    made = torch.Generator().manual_seed(0)
    total = torch.zeros(held["in"].shape[:2])
    for _ in range(probes):
        u = torch.randn(out.shape, generator=made).to(out)
        (back,) = torch.autograd.grad(out, held["in"], u, retain_graph=True)
        total += back.float().square().sum(-1).cpu()
    return (total / probes).sqrt()
