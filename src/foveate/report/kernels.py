"""The figures of `foveate bench kernels`: a table, a table in Markdown, one offline HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from foveate.report.kernels_figures import limits, plots, styles
from foveate.report.kernels_rows import Row, missed, rows, tally
from foveate.report.page import date_of, rendered, written

SCHEMA = "foveate.kernels/1"
_HEAD = ("what", "shape", "time", "rate", "of the limit", "over (ideal)", "goal")
_MARKS = {True: "✓", False: "✗", None: "—"}


def render(results: Mapping[str, Any]) -> str:
    """The whole page as text. Raises ValueError when `results` is of another schema."""
    if results.get("schema") != SCHEMA:
        raise ValueError(f"results: schema is {results.get('schema')!r}, expected {SCHEMA!r}")
    return rendered(
        "kernels.html.j2",
        results=results,
        machine=results["machine"],
        date=date_of(results["updated"]),
        groups=rows(results),
        tally=tally(results),
        missed=missed(results),
        limits=limits(results),
        styles=styles(results),
        plots=plots(results),
        marks=_MARKS,
    )


def write(results: Mapping[str, Any], path: Path) -> Path:
    """Render to `path`, in one step."""
    return written(render(results), path)


def terminal(results: Mapping[str, Any]) -> Table:
    """All lines as a table, a section for every bench."""
    table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
    for name in _HEAD:
        table.add_column(name, overflow="fold")
    for bench, group in rows(results).items():
        table.add_row(f"[bold]{bench}[/]", *[""] * (len(_HEAD) - 1))
        for index, row in enumerate(group):
            cells = ("\n".join(parts) for parts in _cells(row))
            table.add_row(*cells, end_section=index == len(group) - 1)
    return table


def markdown(results: Mapping[str, Any]) -> str:
    """All lines as a table in Markdown, with what it was measured on."""
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, kernels {machine['isa']}, "
        f"PyTorch {machine['torch']}, foveate {machine['foveate']}.",
        "",
        "| " + " | ".join(("bench", *_HEAD)) + " |",
        "|---" * (len(_HEAD) + 1) + "|",
    ]
    for bench, group in rows(results).items():
        for row in group:
            cells = ["<br>".join(parts) for parts in _cells(row)]
            lines.append(f"| {' | '.join([f'`{bench}`', *cells])} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in results["notes"]), ""])


def _cells(row: Row) -> Iterator[list[str]]:
    """The cells of a row, each a list of lines of text."""
    yield [row.name]
    yield [row.shape]
    yield [row.time]
    yield [row.rate]
    yield [f"{row.share} of {row.limit}"]
    over = [f"{x.ratio} {x.name}" + (f" ({x.note})" if x.note else "") for x in row.rivals]
    if over and row.ideal:
        over[0] += f" (ideal {row.ideal})"
    yield over
    yield [f"{_MARKS[goal.met]} {goal.text}" for goal in row.goals]
