"""What every candidate would cost, and lose, in every layer and kv head of a model."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.attention.base import Attention, Call, Result, dense_result
from foveate.bench.tune.influence import mean_loss
from foveate.hf.attach import attach
from foveate.hf.parts import body, head_logits
from foveate.registry import Card

# Logits sampled from at a time; rounds of timing.
_ROWS, _ROUNDS = 256, 3


class Seen(NamedTuple):
    """One layer's call: q (1, Hq, L, D), k, v, the output of dense attention, and the call."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    call: Call


@dataclass(frozen=True, kw_only=True)
class _Tap(Attention):
    """Dense attention that keeps what it sees; `leaves` are added to its outputs, as zeros."""

    card = Card(name="tap", title="-", claim="-", kind="attention", family="dense")

    seen: dict[int, Seen] = field(compare=False)
    leaves: dict[int, Tensor] = field(compare=False)
    layers: Collection[int] | None = field(default=None, compare=False)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Dense attention; gradients of the leaves are those of its output."""
        out = dense_result(q, k, v, call).out
        if self.layers is None or call.layer in self.layers:
            self.seen[call.layer] = Seen(q.detach(), k.detach(), v.detach(), out.detach(), call)
        if torch.is_grad_enabled():
            leaf = self.leaves[call.layer] = torch.zeros_like(out).requires_grad_()
            out = out + leaf
        return Result(out)


def expected_loss(
    model: Any, ids: Tensor, candidates: Sequence[Attention], seed: int = 0
) -> Tensor:
    """Expected KL to dense attention (candidate 0), nats per token, of single changes.

    -> (layers, kv_heads, n). The second-order estimate ½ (g·Δ)², mean over the later half of ids
    (1, L), for a budget leaves nothing out of what is short: Δ is what a candidate changes in a
    head's output, g the gradient of the loss of next tokens that the model itself drew (so that its
    square is the Fisher information). One backward pass for all. Layers with a window of the
    model's own lose infinitely much under anything else.
    """
    tap = _Tap(seen={}, leaves={})
    with torch.enable_grad(), attach(model, prefill=tap):
        hidden = body(model)(ids, use_cache=False).last_hidden_state[0]
        drawn = _drawn(model, hidden.detach(), seed)
        loss = mean_loss(model, hidden, drawn) * len(drawn)
        layers = sorted(tap.leaves)
        grads = dict(
            zip(layers, torch.autograd.grad(loss, [tap.leaves[i] for i in layers]), strict=True)
        )
    config = model.config.get_text_config()
    found = torch.full((config.num_hidden_layers, _kv_heads(tap), len(candidates)), torch.inf)
    found[..., 0] = 0.0
    for layer, seen in tap.seen.items():
        for c, candidate in enumerate(candidates[1:], 1):
            change = (_run(candidate, seen) - seen.out) * grads[layer]
            felt = change.sum(-1)[0].unflatten(0, (seen.k.shape[1], -1)).sum(1)
            found[layer, :, c] = felt[:, felt.shape[1] // 2 :].square().mean(-1) / 2
    return found


def seconds(model: Any, ids: Tensor, candidates: Sequence[Attention], count: int = 3) -> Tensor:
    """Seconds a layer of attention takes under each candidate (n,), over `count` of the layers.

    Candidates run in turn on what the model's layers see of ids (1, L); medians over rounds, then
    the mean over layers.
    """
    total = model.config.get_text_config().num_hidden_layers
    chosen = {(2 * i + 1) * total // (2 * count) for i in range(min(count, total))}
    tap = _Tap(seen={}, leaves={}, layers=chosen)
    with torch.inference_mode(), attach(model, prefill=tap):
        body(model)(ids, use_cache=False)
        times = torch.zeros(len(tap.seen), len(candidates), _ROUNDS)
        for i, seen in enumerate(tap.seen.values()):
            for r in range(-1, _ROUNDS):  # the first round warms up
                for c, candidate in enumerate(candidates):
                    start = time.perf_counter()
                    _run(candidate, seen)
                    times[i, c, r] = time.perf_counter() - start
    return torch.tensor([[median(x) for x in layer] for layer in times.tolist()]).mean(0)


@torch.inference_mode()
def _run(candidate: Attention, seen: Seen) -> Tensor:
    call = seen.call
    options: dict[str, Any] = {"causal": call.causal, "mask": call.mask, "scale": call.scale}
    return candidate(seen.q, seen.k, seen.v, **options, call=call)


def _drawn(model: Any, hidden: Tensor, seed: int) -> Tensor:
    """Next tokens drawn from the model's own distribution, one for every row."""
    made = torch.Generator().manual_seed(seed)
    rows = [
        torch.multinomial(torch.softmax(head_logits(model, x), -1), 1, generator=made)[:, 0]
        for x in hidden.split(_ROWS)
    ]
    return torch.cat(rows)


def _kv_heads(tap: _Tap) -> int:
    if not tap.seen:
        raise ValueError("every layer of this model has a window of its own: there is no choice")
    return next(iter(tap.seen.values())).k.shape[1]
