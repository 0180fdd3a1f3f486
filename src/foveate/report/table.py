"""The comparison table as plain rows of text; a `Column` says all there is to say about one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from foveate.report.numbers import (
    MISSING,
    change,
    divergence,
    kilobytes,
    megabytes,
    percent,
    significant,
    speedup,
)
from foveate.report.records import Record, pick, summaries

LOOKS_AHEAD = "choice sees later tokens"


@dataclass(frozen=True)
class Column:
    """What a column reads (`path` into the summary), how it prints it, and which end is good."""

    title: str
    unit: str
    path: tuple[str, ...]
    show: Callable[[Any], str]
    best: Literal["high", "low"]
    small: Callable[[Record], str] | None = None


@dataclass(frozen=True)
class Cell:
    """A printed number, the number it sorts by, and a smaller second line."""

    text: str
    value: float | None
    small: str

    @property
    def line(self) -> str:
        """Both on one line, the second in brackets."""
        return f"{self.text} ({self.small})" if self.small else self.text


@dataclass(frozen=True)
class Row:
    """One mechanism in the table; `note` numbers the footnotes that apply to it."""

    spec: str
    paper: str
    cells: list[Cell]
    winner: bool
    pareto: bool
    looks_ahead: bool
    notes: list[int]


def _spread(key: str, show: Callable[[Any], str]) -> Callable[[Record], str]:
    """The second line of a repeated measurement: its smallest and largest value."""

    def small(record: Record) -> str:
        low, high = pick(record, key, "min"), pick(record, key, "max")
        return "" if low is None or high is None else f"{show(low)}–{show(high)}"

    return small


def _repeated(title: str, unit: str, key: str, best: Literal["high", "low"]) -> Column:
    show = speedup if unit == "×" else significant
    return Column(title, unit, (key, "median"), show, best, _spread(key, show))


def _cache_share(record: Record) -> str:
    ratio = pick(record, "kv_ratio")
    return "" if ratio is None else f"{percent(ratio)}%"


def _needles_found(record: Record) -> str:
    hits = [hit for _, hit in pick(record, "needle", "by_depth") or [] if hit is not None]
    return f"{sum(hits):g} of {len(hits)}" if hits else ""


def _quality(phase: str) -> list[Column]:
    """What a mechanism does to the output of a phase."""
    quality = f"{phase}_quality"

    def perplexity_change(record: Record) -> str:
        value = pick(record, quality, "perplexity_change")
        return "" if value is None else change(value)

    return [
        Column("Perplexity", "Δ%", (quality, "perplexity"), significant, "low", perplexity_change),
        Column("KL to dense", "nats", (quality, "kl"), divergence, "low"),
        Column("Top\u20111", "%", (quality, "top1"), percent, "high"),
    ]


def _phase(phase: str) -> list[Column]:
    """The columns that both phases share: what was computed, and what it does to the output."""
    return [
        _repeated("Speed\u2011up", "×", f"{phase}_speedup", "high"),
        Column("Density", "%", ("density", phase), percent, "low"),
        Column("Retained mass", "%", ("retained_mass", phase), percent, "high"),
        *_quality(phase),
    ]


HELD = Column("KV cache", "MB", ("kv_bytes",), megabytes, "low", _cache_share)
PER_TOKEN = Column("Cache per token", "kB", ("kv_bytes_per_token",), kilobytes, "low")
PEAK = Column("Cache at its peak", "MB", ("peak_kv_bytes",), megabytes, "low")
NEEDLES = Column("Needles found", "%", ("needle", "accuracy"), percent, "high", _needles_found)
FIRST_TOKEN = _repeated("Time to first token", "s", "prefill_seconds", "low")
RATE = _repeated("Rate", "tokens/s", "decode_tokens_per_second", "high")
GROUPS: dict[str, list[Column]] = {
    "Whole run": [
        _repeated("Speed\u2011up end\u00a0to\u00a0end", "×", "end_to_end_speedup", "high"),
        HELD,
        NEEDLES,
    ],
    "Prefill": [FIRST_TOKEN, *_phase("prefill")],
    "Decode": [RATE, *_phase("decode")],
}
COLUMNS = [column for group in GROUPS.values() for column in group]
PERPLEXITY, KL, TOP1 = GROUPS["Decode"][-3:]


def cell(column: Column, record: Record) -> Cell:
    """What a column says of a summary record."""
    value = pick(record, *column.path)
    small = column.small(record) if column.small and value is not None else ""
    return Cell(column.show(value) if value is not None else MISSING, value, small)


def footnotes(results: Record) -> list[str]:
    """The distinct notes of the summary, without the one the dagger stands for."""
    notes = [note for record in results["summary"] for note in record.get("notes", [])]
    return list(dict.fromkeys(note for note in notes if not note.startswith(LOOKS_AHEAD)))


def rows(results: Record) -> list[Row]:
    """One row per mechanism, in the order of the run, whether it was measured or not."""
    found, notes = summaries(results), footnotes(results)
    return [_row(mechanism, found[mechanism["spec"]], notes) for mechanism in results["mechanisms"]]


def _row(mechanism: Record, record: Record, notes: list[str]) -> Row:
    year = mechanism.get("year")
    title = mechanism.get("title") or ""
    return Row(
        spec=mechanism["spec"],
        paper=f"{title} ({year})" if title and year else title,
        cells=[cell(column, record) for column in COLUMNS],
        winner=bool(record.get("winner")),
        pareto=bool(record.get("pareto")),
        looks_ahead=mechanism.get("selection_causal") is False,
        notes=[notes.index(note) + 1 for note in record.get("notes", []) if note in notes],
    )
