"""How much the loss of a model would change if a head no longer saw what lies far back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate import ops
from foveate.attention.base import Attention, Call, Result
from foveate.attention.sparse.moa import MoA, band
from foveate.bench.tune.allocate import allocate
from foveate.hf.attach import attach
from foveate.hf.parts import body, head_logits
from foveate.ops.tile import cap, default_scale
from foveate.registry import Card

# Rows of logits made at once.
_ROWS = 256


class Influence(NamedTuple):
    """Expected change of the loss (nats per scored token) by what is hidden, to first order.

    by_distance (layers, kv_heads, n): that of all key blocks at distance d of their query block,
    sinks left out, at texts of `length` tokens in blocks of `block`.
    """

    by_distance: Tensor
    block: int
    length: int

    def loss(self, size: int) -> Tensor:
        """That of reading only the last `size` blocks (own one included): (layers, kv_heads)."""
        return self.by_distance[..., size:].sum(-1)


def influence(
    model: Any,
    texts: Sequence[Tensor],
    *,
    block: int = 64,
    sinks: int = 64,
    scored: int | None = None,
) -> Influence:
    """Profile a model on texts (1, L) of one length, mean over them.

    The loss is that of the last `scored` next tokens, of all by default. Whole blocks among the
    first `sinks` tokens count as always visible. One backward pass a text; beyond what that keeps,
    memory is O(L·block) a layer. Layers with a window of the model's own stay 0. Raises ValueError
    for texts of different lengths.
    """
    lengths = {text.shape[-1] for text in texts}
    if len(lengths) != 1:
        raise ValueError(f"texts must have one length, got {sorted(lengths)}")
    sums: dict[int, Tensor] = {}
    probe = _Probe(block=block, sinks=sinks, sums=sums)
    for text in texts:
        embedded = model.get_input_embeddings()(text).detach().requires_grad_()
        with torch.enable_grad(), attach(model, prefill=probe):
            hidden = body(model)(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, :-1]
            first = 0 if scored is None else max(hidden.shape[0] - scored, 0)
            loss = mean_loss(model, hidden[first:], text[0, first + 1 :])
            torch.autograd.grad(loss, embedded)
    layers = model.config.get_text_config().num_hidden_layers
    empty = torch.zeros_like(next(iter(sums.values())))
    profile = torch.stack([sums.get(i, empty) for i in range(layers)]) / len(texts)
    return Influence(profile, block, lengths.pop())


def spans(
    profiles: Sequence[Influence], *, density: float = 0.5, lengths: Sequence[int] = ()
) -> MoA:
    """Rules of least influence, one per layer and kv head, at a mean density of the KV cache.

    The profiles, of several lengths, weigh equally; the density (blocks the last query reads over
    all) holds at their lengths and at `lengths`.
    """
    block, total = profiles[0].block, [float(p.loss(1).sum()) or 1.0 for p in profiles]
    all_lengths = [*(p.length for p in profiles), *lengths]
    rules = _rules(all_lengths, block)
    loss = torch.stack(
        [
            torch.stack(
                [
                    p.loss(band(*rule, p.length, block)) / t
                    for p, t in zip(profiles, total, strict=True)
                ]
            ).sum(0)
            for rule in rules
        ],
        -1,
    ).flatten(0, 1)
    cost = torch.tensor([max(_share(rule, n, block) for n in all_lengths) for rule in rules])
    choice = allocate(cost.expand_as(loss), loss, density * len(loss)).tolist()
    alpha, beta = zip(*(rules[c] for c in choice), strict=True)
    return MoA(block=block, sinks=block, alpha=alpha, beta=beta)


def _share(rule: tuple[float, float], length: int, block: int) -> float:
    """Share of the key blocks that the last query reads: its band and the sink block."""
    n = -(-length // block)
    return min(band(*rule, length, block) + 1, n) / n


def _rules(lengths: Sequence[int], block: int) -> list[tuple[float, float]]:
    """Candidates (alpha, beta): spans above 0 and up to N at every length."""
    low, high = min(lengths), max(lengths)
    step = max(block, high // 8 // block * block)
    found = [
        (float(alpha), eighths / 8)
        for alpha in range(-(low // step) * step, high + 1, step)
        for eighths in range(9)
        if all(0 < alpha + eighths / 8 * n <= n for n in lengths)
    ]
    return [(float(block), 0.0), *found]


def mean_loss(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of hidden states (n, width); logits are made, twice, a few rows at a time."""

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        logits = head_logits(model, states)
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")

    parts = zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    losses = [checkpoint(part, states, wanted, use_reentrant=False) for states, wanted in parts]
    return torch.stack(losses).sum() / targets.numel()


@dataclass(frozen=True, kw_only=True)
class _Probe(Attention):
    """Dense attention that, when the loss is differentiated, adds up each layer's influence."""

    card = Card(name="influence", title="-", claim="-", kind="attention", family="sparse")

    block: int
    sinks: int
    sums: dict[int, Tensor] = field(compare=False)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Dense attention; its output tells `_note` its gradient."""
        out, lse = ops.attend(q, k, v, return_lse=True, **call.options())
        known = [x.detach() for x in (q, k, v, out, lse)]
        out.register_hook(partial(self._note, known, call))
        return Result(out, lse)

    def _note(self, known: list[Tensor], call: Call, grad: Tensor) -> None:
        q, k, v, out, lse = known
        found = by_distance(
            *(q, k, v, out, lse, grad),
            scale=default_scale(call.scale, q.shape[3]),
            softcap=call.softcap,
            block=self.block,
            sinks=self.sinks,
        )
        held = self.sums.get(call.layer)
        self.sums[call.layer] = found if held is None else held + found


@torch.no_grad()
def by_distance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    *,
    scale: float,
    block: int,
    sinks: int = 0,
    softcap: float | None = None,
) -> Tensor:
    """Influence by block distance (Hkv, n) of causal attention, from the gradient of its output.

    Hiding key j from query i and normalising again changes the loss, to first order, by
    E = -A (g - delta) / (1 - A), with g = dout·v_j and delta = dout·out; |E| is added up.
    """
    n, group, length = -(-q.shape[2] // block), q.shape[1] // k.shape[1], q.shape[2]
    delta = (grad * out).sum(-1, keepdim=True)
    total = torch.zeros(k.shape[1], n, dtype=torch.promote_types(q.dtype, torch.float32))
    for tile in range(n):
        rows = slice(tile * block, min((tile + 1) * block, length))
        keys = slice(0, rows.stop)
        logits = cap(ops.grouped_logits(q[:, :, rows], k[:, :, keys], scale), softcap)
        weight = torch.exp(logits - lse[:, :, rows, None])
        change = weight * (
            ops.grouped_logits(grad[:, :, rows], v[:, :, keys], 1.0) - delta[:, :, rows]
        )
        change = (change / (1 - weight).clamp_min(1e-5)).abs()
        at = torch.arange(rows.start, rows.stop)
        change = change.masked_fill(torch.arange(rows.stop) > at[:, None], 0.0)
        change = torch.nn.functional.pad(change, (0, (tile + 1) * block - rows.stop))
        blocks = change.unflatten(-1, (tile + 1, block)).sum((0, 2, 4))
        blocks[:, : min(sinks // block, tile)] = 0
        total[:, : tile + 1] += blocks.unflatten(0, (-1, group)).sum(1).flip(-1)
    return total
