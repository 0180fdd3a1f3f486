"""Tables for the terminal, from the same columns as the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from foveate.report import decoding as by_length
from foveate.report.numbers import MISSING
from foveate.report.table import COLUMNS, GROUPS, Cell, Column, Row, rows

# A narrower terminal gets the columns that decide: speed and fidelity.
_WIDE = 132
_SPEC_WIDTH = 28


def comparison(results: Mapping[str, Any], width: int) -> Table:
    """The comparison in `width` characters: a line for prefill and a line for decoding each."""
    wide = width >= _WIDE
    whole = GROUPS["Whole run"] if wide else GROUPS["Whole run"][:1]
    phases = [(phase, _columns(phase, wide)) for phase in ("Prefill", "Decode")]
    table = _table()
    for column in whole:
        table.add_column(f"{column.title}\n{column.unit}", justify="right")
    table.add_column("phase")
    for column in phases[0][1]:
        first = "time, rate\ns, tokens/s" if column.unit == "s" else None
        table.add_column(first or f"{column.title}\n{column.unit}", justify="right", no_wrap=True)
    for row in rows(results):
        name = _name(row)
        for phase, columns in phases:
            held = [_text(row, c) for c in whole] if phase == "Prefill" else [""] * len(whole)
            own = [_text(row, c) for c in columns]
            table.add_row(name, *held, phase.lower(), *own, end_section=phase == "Decode")
            name = Text()
    return table


def decoding(results: Mapping[str, Any], width: int) -> Table:
    """What decoding costs after a prompt of every length, in `width` characters."""
    columns = by_length.COLUMNS if width >= _WIDE else by_length.DECISIVE
    table = _table()
    table.add_column("tokens", justify="right")
    for column in columns:
        table.add_column(f"{column.title}\n{column.unit}", justify="right")
    for spec, lines in by_length.figures(results, columns).items():
        name = Text(spec)
        for tokens, cells in lines:
            texts = [_short(x, column) for x, column in zip(cells, columns, strict=True)]
            table.add_row(name, f"{tokens:,}", *texts)
            name = Text()
        table.add_section()
    return table


def _table() -> Table:
    """A table with a line, or more, for every mechanism."""
    table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
    table.add_column("mechanism", overflow="fold", min_width=_SPEC_WIDTH, max_width=_SPEC_WIDTH)
    return table


def _columns(phase: str, wide: bool) -> list[Column]:
    """The columns of a phase, without those of little weight when room is short."""
    columns = GROUPS[phase]
    return columns if wide else [c for c in columns[1:] if c.title not in ("Retained mass",)]


def _name(row: Row) -> Text:
    marks = ("★" if row.winner else "") + ("†" if row.looks_ahead else "")
    return Text(f"{row.spec} {marks}".strip(), style="bold green" if row.winner else "")


def _text(row: Row, column: Column) -> str:
    return _short(row.cells[next(i for i, c in enumerate(COLUMNS) if c is column)], column)


def _short(cell: Cell, column: Column) -> str:
    """A cell's number; a perplexity brings its change along."""
    return cell.line if column.unit == "Δ%" else cell.text


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A plain table of text; only its last column wraps."""
    table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
    for name in head:
        table.add_column(name, no_wrap=name != head[-1], overflow="fold")
    for line in lines:
        table.add_row(*(cell or MISSING for cell in line))
    return table
