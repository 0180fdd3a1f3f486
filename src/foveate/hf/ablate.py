"""`ablate` and `force`: heads put out of action, or made to look where they are told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.hf.parts import Inputs, Parts, real_tokens, run
from foveate.hf.watch import Seen, watch
from foveate.registry import nearest

# The step between logits that leaves all weight on the larger.
_STEEP = 1e4
MODES = ("zero", "mean", "resample", "sink", "uniform", "value")


@contextmanager
def ablate(
    model: Any,
    heads: Iterable[tuple[int, int]],
    mode: str = "zero",
    *,
    reference: Inputs | None = None,
) -> Iterator[None]:
    """Put query heads (layer, head) out of action, before the output projection.

    zero: the output is 0; mean: its mean over the real tokens of `reference`; resample: what it is
    on `reference`, position by position, which must be as long as the text; sink: it reads the
    first key it may see alone; uniform: all keys alike; value: its own token alone. Raises
    ValueError for an unknown mode or a missing reference, IndexError for a head out of range.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}{nearest(mode, MODES)}")
    if (reference is None) == (mode in ("mean", "resample")):
        needs = "needs" if reference is None else "takes no"
        raise ValueError(f"mode {mode!r} {needs} reference")
    chosen = by_layer(Parts(model).check_heads(heads))
    instead = {} if reference is None else _instead(model, chosen, mode, reference)

    def attention(seen: Seen) -> Tensor | None:
        own = chosen.get(seen.layer)
        if own is None:
            return None
        out = seen.out.clone()
        if seen.layer in instead:
            out[:, own] = _fitting(instead[seen.layer], out[:, own])
        else:
            out[:, own] = _without_logits(seen, mode)[:, own]
        return out

    with watch(model, attention=attention):
        yield


@contextmanager
def force(
    model: Any, heads: Iterable[tuple[int, int]], weights: Tensor | Mapping[int, float]
) -> Iterator[None]:
    """Make the last row of heads (layer, head) attend with given weights; other rows are as ever.

    weights: of every key, (Lk,), or by position, the rest 0. They apply to calls of as many keys.
    Raises IndexError for a head or a position out of range.
    """
    chosen = by_layer(Parts(model).check_heads(heads))

    def attention(seen: Seen) -> Tensor | None:
        own = chosen.get(seen.layer)
        if own is None:
            return None
        row = _row(weights, seen.k.shape[2]).to(seen.v)
        values = (row @ seen.v).repeat_interleave(seen.q.shape[1] // seen.v.shape[1], 1)
        out = seen.out.clone()
        out[:, own, -1] = values[:, own]
        return out

    with watch(model, attention=attention):
        yield


def by_layer(heads: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Heads of every layer that has any."""
    found: dict[int, list[int]] = {}
    for layer, head in heads:
        found.setdefault(layer, []).append(head)
    return found


def head_outputs(
    model: Any, inputs: Inputs, layers: Iterable[int] | None = None
) -> dict[int, Tensor]:
    """Outputs (B, Hq, L, Dv) of the heads of every layer, before the output projection.

    They take L · width numbers a layer: ask for the layers you need.
    """
    wanted = None if layers is None else set(layers)
    held = {}

    def attention(seen: Seen) -> None:
        if wanted is None or seen.layer in wanted:
            held[seen.layer] = seen.out

    with torch.no_grad(), watch(model, attention=attention):
        run(model, inputs)
    return held


def _instead(
    model: Any, chosen: dict[int, list[int]], mode: str, reference: Inputs
) -> dict[int, Tensor]:
    """What takes the place of the chosen heads, (1|B, heads, 1|L, Dv) by layer."""
    outs = {i: out[:, chosen[i]] for i, out in head_outputs(model, reference, chosen).items()}
    if mode == "resample":
        return outs
    real = real_tokens(reference)
    return {i: out.transpose(1, 2)[real].mean(0)[None, :, None] for i, out in outs.items()}


def _fitting(instead: Tensor, out: Tensor) -> Tensor:
    lengths = instead.shape[2], out.shape[2]
    if 1 != lengths[0] != lengths[1] or instead.shape[0] not in (1, out.shape[0]):
        raise ValueError(
            f"the reference has (batch, length) {(instead.shape[0], lengths[0])}, the text "
            f"{(out.shape[0], lengths[1])}: resample needs the same"
        )
    return instead.expand_as(out)


def _without_logits(seen: Seen, mode: str) -> Tensor:
    """Outputs that do not depend on what the head would look at."""
    if mode == "zero":
        return torch.zeros_like(seen.out)
    if mode == "uniform":
        return seen.attend(torch.zeros_like(seen.q), seen.k, seen.v)[0]
    if mode == "value":
        own = seen.v[:, :, -seen.q.shape[2] :]
        return own.repeat_interleave(seen.q.shape[1] // seen.v.shape[1], 1)
    # Logits that fall so fast that all the weight is on the first key a row may see.
    q, k = torch.zeros_like(seen.q), torch.zeros_like(seen.k)
    q[..., 0], k[..., 0] = 1.0, -_STEEP * torch.arange(k.shape[2], device=k.device)
    options = seen.options() | {"scale": 1.0, "softcap": None}
    return ops.attend(q, k, seen.v, **options)


def _row(weights: Tensor | Mapping[int, float], keys: int) -> Tensor:
    """Weights as a row (Lk,)."""
    if isinstance(weights, Tensor):
        if weights.shape != (keys,):
            raise IndexError(f"there are {keys} keys, got weights of {tuple(weights.shape)}")
        return weights
    row = torch.zeros(keys)
    for at, weight in weights.items():
        if not 0 <= at < keys:
            raise IndexError(f"there are {keys} keys, none at position {at}")
        row[at] = weight
    return row
