"""The page of `foveate inspect`: one self-contained offline HTML file from one record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveate.report.page import date_of, rendered, written

SCHEMA = "foveate.inspect/1"
_DATA = (
    *("model", "tokens", "metrics", "layers", "overlays", "looks", "start"),
    *("cells", "maps", "distances", "profiles", "top_tokens"),
)


def render(results: Mapping[str, Any]) -> str:
    """The whole page as text. Raises ValueError when `results` is of another schema."""
    if results.get("schema") != SCHEMA:
        raise ValueError(f"results: schema is {results.get('schema')!r}, expected {SCHEMA!r}")
    return rendered(
        "inspect.html.j2",
        headline=_headline(results),
        facts=_facts(results),
        model=results["model"],
        tokens=len(results["tokens"]),
        text=results["text"]["name"],
        ablation=_ablation(results),
        notes=results["notes"],
        command=results["command"],
        machine=results["machine"],
        date=date_of(results["created"]),
        data={name: results[name] for name in _DATA},
    )


def write(results: Mapping[str, Any], path: Path) -> Path:
    """Render to `path`, in one step."""
    return written(render(results), path)


def _values(results: Mapping[str, Any], name: str) -> list[float]:
    """The figures of a metric over all heads, none where it was not measured."""
    rows = [m["values"] for m in results["metrics"] if m["name"] == name]
    return [x for row in (rows[0] if rows else []) for x in row if x is not None]


def _headline(results: Mapping[str, Any]) -> str:
    """What the model does, in a sentence."""
    sinks = _values(results, "sink")
    share = sum(x > 0.3 for x in sinks) / len(sinks)
    said = f"{share:.0%} of the heads of {results['model']['name']} rest on the first token"
    copying = _values(results, "retrieval")
    if copying:
        said += f"; {sum(x >= 0.1 for x in copying)} of {len(copying)} copy from far back"
    return said


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures at the top."""
    entropy, sinks = _values(results, "entropy"), _values(results, "sink")
    facts = [
        ("mean entropy, 1 is uniform", f"{sum(entropy) / len(entropy):.2f}"),
        ("mean weight of the first token", f"{sum(sinks) / len(sinks):.0%}"),
    ]
    for name, label in (
        ("retrieval", "retrieval score"),
        ("previous", "most on the token before"),
    ):
        values = _values(results, name)
        if values:
            facts.append((label, f"{max(values):.2f}"))
    return facts


def _ablation(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of what happens without some heads."""
    found = results["ablation"]
    if not found:
        return None
    rows = [
        {"name": row["name"], "cells": [f"{row['loss']:.3f}", f"{row['accuracy']:.0%}"]}
        for row in found["rows"]
    ]
    columns = ["Loss on the text, nats a token", "Answer tokens right"]
    return {"what": found["what"], "columns": columns, "rows": rows}
