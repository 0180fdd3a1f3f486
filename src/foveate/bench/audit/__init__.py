"""The audit: every mechanism against every property it owes, one table without an empty cell."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveate.registry import create, find, lookup, spec_of

AUDITED = ("attention", "cache", "module")


class Fault(AssertionError):
    """A property that does not hold; the message says by how much."""


class Unfit(Exception):
    """A property that does not apply; the message says why."""


Check = Callable[[Any], None]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Raise Fault when two results differ, or hold a NaN."""
    gap = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    if not gap <= tolerance:
        raise Fault(f"differs by {gap:.2e}, {tolerance:.0e} is allowed")


def survives_copying(cls: Any) -> None:
    """A configuration survives its spec string, JSON, pickling and copying."""
    made = create(cls.card.name, **cls.card.small)
    plain = json.loads(json.dumps(dataclasses.asdict(made)))
    held = {k: tuple(x) if isinstance(x, list) else x for k, x in plain.items()}
    copies = (create(spec_of(made)), cls(**held), pickle.loads(pickle.dumps(made)))
    for other in (*copies, copy.deepcopy(made)):
        if other != made or hash(other) != hash(made):
            raise Fault(f"{other} is not {made}")


@dataclass(frozen=True)
class Verdict:
    """One cell: passed, does not apply (with the reason), or failed (with what was seen)."""

    mechanism: str
    prop: str
    state: str
    reason: str = ""


def properties(kind: str) -> dict[str, Check]:
    """The checks for a kind by name, in the order of the table."""
    if kind == "attention":
        from foveate.bench.audit.attention import PROPERTIES

        return PROPERTIES
    if kind == "cache":
        from foveate.bench.audit.cache import PROPERTIES as POLICIES

        return POLICIES
    if kind == "module":
        from foveate.bench.audit.module import PROPERTIES as LAYERS

        return LAYERS
    raise ValueError(f"nothing to audit for kind {kind!r}; known: {', '.join(AUDITED)}")


def verdict(name: str, prop: str) -> Verdict:
    """Check one property of one registered mechanism."""
    cls = lookup(name)
    exempt = cls.card.exempt.get(prop)
    if exempt:
        return Verdict(name, prop, "n/a", exempt)
    try:
        properties(cls.card.kind)[prop](cls)
    except Unfit as reason:
        return Verdict(name, prop, "n/a", str(reason))
    except Fault as fault:
        return Verdict(name, prop, "failed", str(fault))
    return Verdict(name, prop, "passed")


def audited(names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Mechanisms that can be audited, as (name, kind), or the named ones; ValueError if unknown."""
    cards = [lookup(name).card for name in names] or find()
    for card in cards:
        if names:
            properties(card.kind)
    return [(c.name, c.kind) for c in cards if c.kind in AUDITED]


def audit(names: Sequence[str] = ()) -> Iterator[Verdict]:
    """Every cell of the table, mechanism by mechanism."""
    for name, kind in audited(names):
        for prop in properties(kind):
            yield verdict(name, prop)
