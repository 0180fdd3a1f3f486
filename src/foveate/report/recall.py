"""What `foveate recall` found: a table, a table in Markdown, one offline HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from foveate.report.figures import COLOURS, SYMBOLS
from foveate.report.numbers import kilobytes, percent, significant
from foveate.report.page import date_of, rendered, written

SCHEMA = "foveate.recall/1"
_HEAD = ("layers", "width", "parameters", "state, kB", "right, %", "spread", "seconds")


def render(results: Mapping[str, Any]) -> str:
    """The whole page as text. Raises ValueError when `results` is of another schema."""
    if results.get("schema") != SCHEMA:
        raise ValueError(f"results: schema is {results.get('schema')!r}, expected {SCHEMA!r}")
    return rendered(
        "recall.html.j2",
        results=results,
        machine=results["machine"],
        task=results["settings"]["task"],
        date=date_of(results["updated"]),
        head=_HEAD,
        rows=rows(results),
        styles=styles(results),
        plots=plots(results),
        best=best(results),
    )


def write(results: Mapping[str, Any], path: Path) -> Path:
    """Render to `path`, in one step."""
    return written(render(results), path)


def rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line for every pattern and width: its cells."""
    return [
        (
            line["layers"],
            str(line["width"]),
            f"{line['parameters']:,}",
            kilobytes(line["state_bytes"]),
            percent(line["accuracy"]),
            _spread(line),
            significant(line["seconds"], 2),
        )
        for line in _ordered(results)
    ]


def terminal(results: Mapping[str, Any]) -> Table:
    """All lines as a table."""
    table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
    for i, name in enumerate(_HEAD):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows(results):
        table.add_row(*row)
    return table


def markdown(results: Mapping[str, Any]) -> str:
    """All lines as a table in Markdown."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---" + "|---:" * (len(_HEAD) - 1) + "|"]
    lines += [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in rows(results)]
    return "\n".join([*lines, ""])


def styles(results: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Colour number and symbol of every pattern, the same everywhere."""
    return {
        pattern: (1 + i % COLOURS, SYMBOLS[(i + i // COLOURS) % len(SYMBOLS)])
        for i, pattern in enumerate(results["settings"]["layers"])
    }


def plots(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of every pattern, by state: what the plots draw."""
    style = styles(results)
    found: dict[str, list[dict[str, Any]]] = {}
    for line in _ordered(results):
        found.setdefault(line["layers"], []).append(line)
    return [
        {
            "spec": pattern,
            "colour": style[pattern][0],
            "symbol": style[pattern][1],
            "points": [
                {
                    "state": line["state_bytes"],
                    "parameters": line["parameters"],
                    "y": line["accuracy"],
                    "low": line["low"],
                    "high": line["high"],
                    "hover": [
                        f"width {line['width']}, {line['parameters']:,} parameters",
                        f"state {kilobytes(line['state_bytes'])} kB",
                        f"{percent(line['accuracy'])}% right ({_spread(line)})",
                    ],
                }
                for line in lines
            ],
        }
        for pattern, lines in found.items()
    ]


def best(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The smallest state that recalls 95 % or more, or else what recalls most; None before any."""
    lines = results["summary"]
    if not lines:
        return None
    good = [line for line in lines if line["accuracy"] >= 0.95]
    if good:
        return min(good, key=lambda line: line["state_bytes"]) | {"good": True}
    return max(lines, key=lambda line: line["accuracy"]) | {"good": False}


def _ordered(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lines by pattern, as they were asked for, and by width."""
    order = {pattern: i for i, pattern in enumerate(results["settings"]["layers"])}
    return sorted(results["summary"], key=lambda line: (order[line["layers"]], line["width"]))


def _spread(line: Mapping[str, Any]) -> str:
    """Lowest and highest of the seeds."""
    if line["seeds"] < 2:
        return "one seed"
    return f"{percent(line['low'])} to {percent(line['high'])}"
