"""Reading results records in which any measurement may be missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Record = Mapping[str, Any]


def pick(record: Any, *path: str) -> Any:
    """The value under nested keys; None as soon as one of them is missing or null."""
    for key in path:
        if record is None:
            return None
        record = record.get(key)
    return record


def worst(record: Record, key: str) -> float | None:
    """The larger value of a quality measure over prefill and decode; None if neither is known."""
    phases = (pick(record, f"{phase}_quality", key) for phase in ("prefill", "decode"))
    return max((value for value in phases if value is not None), default=None)


def summaries(results: Record) -> dict[str, Record]:
    """The summary record of every mechanism by its spec, empty where nothing was summarised."""
    found = {record["spec"]: record for record in results["summary"]}
    return {m["spec"]: found.get(m["spec"], {}) for m in results["mechanisms"]}


def measured(results: Record, kind: str, spec: str) -> Iterator[Record]:
    """The measurements of one kind for one mechanism, in the order they were made."""
    return (m for m in results["measurements"] if m["kind"] == kind and m["spec"] == spec)
