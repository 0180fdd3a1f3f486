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


def longest(results: Record) -> int:
    """The length of the prompt that decides, in tokens."""
    return int(results["settings"]["lengths"][-1])


def measured(
    results: Record, kind: str, spec: str | None = None, *, tokens: int | None = None
) -> Iterator[Record]:
    """The measurements of one kind at one length, in the order they were made.

    spec: of this mechanism only; tokens: the length, None for the longest.
    """
    at = longest(results) if tokens is None else tokens
    found = (m for m in results["measurements"] if m["kind"] == kind and m["tokens"] == at)
    return (m for m in found if spec is None or m["spec"] == spec)
