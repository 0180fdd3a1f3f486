"""`patch`, `path_patch` and `direct_effects`: what one run changes when it gets another's heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate.hf.ablate import by_layer, head_outputs
from foveate.hf.parts import Inputs, Parts, head_logits, run
from foveate.hf.watch import Seen, watch

# The largest difference, relative to 1 + |logit|, of a plain pass rebuilt from its parts.
_REBUILT = 1e-3


@contextmanager
def patch(
    model: Any,
    source: Mapping[int, Tensor],
    heads: Iterable[tuple[int, int]],
    *,
    positions: slice | Tensor = slice(None),
) -> Iterator[None]:
    """Give query heads (layer, head) the outputs of another run, at all or some positions.

    source: outputs (B, Hq, L, Dv) by layer, from `head_outputs`, of a text as long as this one.
    Raises IndexError for a head out of range, ValueError where the lengths differ.
    """
    chosen = by_layer(Parts(model).check_heads(heads))

    def attention(seen: Seen) -> Tensor | None:
        own = chosen.get(seen.layer)
        if own is None:
            return None
        out, given = seen.out.clone(), source[seen.layer]
        if given.shape != out.shape:
            raise ValueError(
                f"layer {seen.layer} gives {tuple(out.shape)}, the other run gave "
                f"{tuple(given.shape)}: patching needs texts of the same length"
            )
        for head in own:
            out[:, head, positions] = given[:, head, positions]
        return out

    with watch(model, attention=attention):
        yield


@torch.no_grad()
def path_patch(
    model: Any,
    clean: Inputs,
    corrupt: Inputs,
    senders: Iterable[tuple[int, int]],
    receivers: Iterable[tuple[int, int]],
    *,
    via: str = "q",
) -> Tensor:
    """Last hidden states (B, L, width) of `clean` when receivers hear senders as in `corrupt`.

    The senders' outputs come from `corrupt`, every other head stays as in `clean`, and what
    reaches the receivers' queries (via "q"), keys ("k") or values ("v") replaces it in a clean
    run. Keys and values are those of a kv head: all query heads of its group receive. Raises
    ValueError for another `via`, IndexError for a head out of range.
    """
    if via not in ("q", "k", "v"):
        raise ValueError(f'via must be "q", "k" or "v", got {via!r}')
    parts = Parts(model)
    hearing = by_layer(parts.check_heads(receivers))
    frozen, sent = head_outputs(model, clean), head_outputs(model, corrupt)
    sending = by_layer(parts.check_heads(senders))
    heard: dict[int, Tensor] = {}

    def with_senders(seen: Seen) -> Tensor:
        if seen.layer in hearing:
            heard[seen.layer] = getattr(seen, via)
        out = frozen[seen.layer].clone()
        for head in sending.get(seen.layer, ()):
            out[:, head] = sent[seen.layer][:, head]
        return out

    def with_heard(seen: Seen) -> None:
        for head in hearing.get(seen.layer, ()):
            changed = getattr(seen, via).clone()
            own = head * changed.shape[1] // seen.q.shape[1]
            changed[:, own] = heard[seen.layer][:, own]
            setattr(seen, via, changed)

    with watch(model, attention=with_senders):
        run(model, clean)
    with watch(model, attention=with_heard):
        return run(model, clean)


@torch.no_grad()
def direct_effects(
    model: Any, clean: Inputs, corrupt: Inputs, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """How much each head's output of `corrupt` changes a score of `clean`, (layers, Hq, B).

    The head's output at the last position is exchanged, all later heads stay as they are, and the
    feed-forward parts answer: so one position is all that must be computed. `score` turns logits
    (n, B, vocabulary) of the last position into (n, B). Raises TypeError for a model whose blocks
    do not add their parts to one stream.
    """
    parts = Parts(model)
    own, other = _last(model, clean), _last(model, corrupt)
    plain = score(head_logits(model, own.final[None]))
    rebuilt = score(_onward(parts, own, 0, own.entering[0][None]))
    if bool(((rebuilt - plain).abs() > _REBUILT * (1 + plain.abs())).any()):
        raise TypeError(
            f"{parts.name}: its blocks do not simply add attention and feed-forward parts to the "
            "stream, so that direct effects cannot be computed from one position"
        )
    rows = []
    for layer in range(parts.layers):
        change = (other.heads[layer] - own.heads[layer])[:, :, None]
        moved = parts.contributions(layer, change)[:, :, 0].transpose(0, 1)
        rows.append(score(_onward(parts, own, layer, own.entering[layer] + moved)) - plain)
    return torch.stack(rows)


class _Last:
    """A run at its last position: by layer what entered, attention's part, the heads' outputs."""

    def __init__(self) -> None:
        self.entering: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.heads: list[Tensor] = []
        self.final = torch.empty(0)


def _last(model: Any, inputs: Inputs) -> _Last:
    """The last position of a run; texts are padded on the left, if at all."""
    held = _Last()

    def entering(layer: int, x: Tensor) -> None:
        held.entering.append(x[:, -1])

    def attended(layer: int, x: Tensor) -> None:
        held.attention.append(x[:, -1])

    def heads(seen: Seen) -> None:
        held.heads.append(seen.out[:, :, -1])

    with watch(model, attention=heads, block_in=entering, attention_out=attended):
        held.final = run(model, inputs)[:, -1]
    return held


def _onward(parts: Parts, own: _Last, layer: int, x: Tensor) -> Tensor:
    """Logits (n, B, vocabulary) from streams (n, B, width) that enter a layer."""
    for i in range(layer, parts.layers):
        x = x + own.attention[i]
        x = x + parts.mlp(i)(parts.norm_before_mlp(i)(x))
    return head_logits(parts.model, parts.final_norm()(x))
