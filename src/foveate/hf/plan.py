"""What runs where: the slots of `attach` spelled out per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.attention.base import Attention, Call, Record, Result
from foveate.cache.base import CachePolicy
from foveate.registry import Card, create, lookup

SLOTS = ("prefill", "decode", "cache")
# A plan in a file stands in the place of a slot.
_NAMED = (*SLOTS, "plan")


@dataclass(frozen=True, kw_only=True)
class PerHead(Attention):
    """A mechanism for each kv head and the query heads that read it."""

    card = Card(
        name="per_head",
        title="A plan per head",
        claim="each kv head has its own mechanism",
        kind="attention",
        family="dense",
    )

    heads: tuple[Attention, ...] = ()

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Run every distinct mechanism on its heads; what they record is told as one."""
        if len(self.heads) != k.shape[1]:
            raise ValueError(f"the plan names {len(self.heads)} kv heads, k has {k.shape[1]}")
        group = q.shape[1] // k.shape[1]
        out = q.new_empty(*q.shape[:3], v.shape[3])
        report, call.record, held = call.record, None, []
        for mechanism in dict.fromkeys(self.heads):
            told: list[Record] = []
            own_call = dataclasses.replace(call, record=told.append if report else None)
            at = torch.tensor([i for i, m in enumerate(self.heads) if m == mechanism])
            rows = (at[:, None] * group + torch.arange(group)).flatten()
            part = (q[:, rows], k[:, at], v[:, at])
            if call.mask is not None and call.mask.heads > 1:
                raise ValueError(
                    "a plan per head cannot be joined with a mask that differs by head"
                )
            own: dict[str, Any] = {"causal": call.causal, "mask": call.mask, "scale": call.scale}
            out[:, rows] = mechanism(*part, **own, call=own_call)
            held += [(len(at), record) for record in told[-1:]]
        if report and held:
            report(_together(held, len(self.heads)))
        return Result(out)


def _together(held: list[tuple[int, Record]], heads: int) -> Record:
    """One record of what mechanisms did on some of the heads each; the picture is the first's."""
    dense = heads - sum(count for count, _ in held)
    density = (dense + sum(n * x.density for n, x in held)) / heads
    mass = (dense + sum(n * x.retained_mass for n, x in held)) / heads
    return held[0][1]._replace(density=density, retained_mass=mass)


def slots_of(spec: str) -> dict[str, str]:
    """The slots a comparison spec fills: `slot=mechanism` parts joined by `+`.

    A part without a slot goes where its card says: `snapkv` to cache, `tidal` to decode,
    `flexprefill` to prefill, a mechanism made for both phases to prefill and decode.
    """
    slots: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in spec.split("+"))):
        slot, sign, rest = part.partition("=")
        if sign and slot.strip() in _NAMED:
            wanted = {slot.strip(): rest.strip()}
        else:
            card = lookup(part.partition(":")[0].strip()).card
            places = ("cache",) if card.kind == "cache" else card.phases
            wanted = dict.fromkeys(places, part)
        for name, value in wanted.items():
            if name in slots:
                raise ValueError(f"{spec!r} fills the slot {name} twice")
            slots[name] = value
    if not slots:
        raise ValueError("an empty spec names no mechanism")
    return slots


def attention_plan(slot: str, value: Any, layers: int) -> list[Attention | None]:
    """A mechanism (or None: dense) for each layer from what the caller gave for a slot."""
    return [_attention(slot, x) for x in _spread(slot, value, layers)]


def cache_plan(value: Any, layers: int) -> list[CachePolicy | None]:
    """A policy (or None: store everything) for each layer."""
    plan = [_policy(x) for x in _spread("cache", value, layers)]
    for policy in {id(x): x for x in plan if x is not None}.values():
        policy.check_layers(layers)
    return plan


def _spread(slot: str, value: Any, layers: int) -> list[Any]:
    """One entry per layer from one value, a list with one per layer, or {layer: value}."""
    if isinstance(value, Mapping):
        wrong = [k for k in value if not isinstance(k, int) or not -layers <= k < layers]
        if wrong:
            raise ValueError(f"{slot} plan: no layer {wrong[0]!r}; the model has {layers}")
        table = {k % layers: v for k, v in value.items()}
        return [table.get(i) for i in range(layers)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != layers:
            raise ValueError(f"{slot} plan has {len(value)} entries; the model has {layers} layers")
        return list(value)
    made = create(value) if isinstance(value, str) else value
    return [made] * layers


def _attention(slot: str, value: Any) -> Attention | None:
    if isinstance(value, Sequence) and not isinstance(value, str):
        heads = [_attention(slot, create("dense") if x is None else x) for x in value]
        if stateful := [h.card.name for h in heads if h is not None and h.stateful]:
            raise ValueError(f"{stateful[0]} keeps state for a whole layer: it cannot serve heads")
        return PerHead(heads=tuple(h for h in heads if h is not None))
    made = create(value) if isinstance(value, str) else value
    if made is None:
        return None
    if not isinstance(made, Attention):
        raise TypeError(f"the slot {slot} takes a mechanism of kind attention, got {_name(made)}")
    if not isinstance(made, PerHead) and slot not in made.card.phases:
        raise ValueError(
            f"{made.card.name} is made for {' and '.join(made.card.phases)}: it cannot fill the "
            f"slot {slot}"
        )
    return made


def _policy(value: Any) -> CachePolicy | None:
    made = create(value) if isinstance(value, str) else value
    if made is not None and not isinstance(made, CachePolicy):
        raise TypeError(f"the slot cache takes a mechanism of kind cache, got {_name(made)}")
    return made


def _name(made: Any) -> str:
    card = getattr(made, "card", None)
    return f"{card.name} (kind {card.kind})" if card is not None else repr(made)


def python_line(slots: Mapping[str, str]) -> str:
    """The Python that uses a choice of slots."""
    if not slots:
        return "model.generate(...)"
    args = ", ".join(f'{slot}="{spec}"' for slot, spec in slots.items())
    return f"with foveate.attach(model, {args}):\n    model.generate(...)"
