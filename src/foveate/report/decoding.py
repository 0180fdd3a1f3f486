"""Decoding after prompts of several lengths: what the charts draw and the tables print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from foveate.report.numbers import change, speedup
from foveate.report.records import Record, longest, pick, summaries
from foveate.report.table import (
    FIRST_TOKEN,
    HELD,
    KL,
    NEEDLES,
    PEAK,
    PER_TOKEN,
    PERPLEXITY,
    RATE,
    TOP1,
    Cell,
    Column,
    cell,
)

# What decides between cache policies, and everything that is measured of decoding.
DECISIVE = (HELD, RATE, PERPLEXITY, NEEDLES)
COLUMNS = (HELD, PER_TOKEN, PEAK, FIRST_TOKEN, RATE, PERPLEXITY, KL, TOP1, NEEDLES)


@dataclass(frozen=True)
class Chart:
    """A figure against length: what it draws, how its axis runs, its ticks as a d3-format."""

    title: str
    column: Column
    axis: Literal["zero", "free", "log"]
    ticks: str


_CHANGE = Column("Perplexity", "", ("decode_quality", "perplexity_change"), change, "low")
CHARTS = (
    Chart("Decoding, tokens/s", RATE, "zero", ""),
    Chart("Time to first token, s", FIRST_TOKEN, "zero", ""),
    Chart("Cache per token, bytes", PER_TOKEN, "zero", "~s"),
    Chart("Cache at its peak, bytes", PEAK, "zero", "~s"),
    Chart("KL to dense, nats", KL, "log", ""),
    Chart("Top\u20111 as dense", TOP1, "free", "~%"),
    Chart("Perplexity, change in %", _CHANGE, "free", "+~f"),
    Chart("Needles found", NEEDLES, "zero", "~%"),
)


def figures(
    results: Record, columns: Sequence[Column] = COLUMNS
) -> dict[str, list[tuple[int, list[Cell]]]]:
    """For every mechanism a line at each length: the tokens of the prompt, and its cells."""
    lines: dict[str, list[tuple[int, list[Cell]]]] = {}
    for spec, record in summaries(results).items():
        found = {figures["tokens"]: figures for figures in record.get("by_length") or []}
        lines[spec] = [
            (tokens, [cell(column, found.get(tokens, {})) for column in columns])
            for tokens in results["settings"]["lengths"]
        ]
    return lines


def charts(results: Record) -> list[dict[str, Any]]:
    """What every chart draws: the values of each mechanism, and their texts, at each length.

    Nothing where there is one length only.
    """
    if len(results["settings"]["lengths"]) < 2:
        return []
    drawn = []
    for chart in CHARTS:
        lines = []
        for line in figures(results, [chart.column]).values():
            cells = [only for _, (only,) in line]
            texts = [f"{x.text} {chart.column.unit}".strip() for x in cells]
            lines.append({"values": [x.value for x in cells], "texts": texts})
        axis = {"title": chart.title, "axis": chart.axis, "ticks": chart.ticks}
        drawn.append(axis | {"lines": lines})
    return drawn


def markdown(results: Record) -> str:
    """The decisive columns at the longest length as a table in Markdown."""
    machine = results["machine"]
    lines = [
        f"{longest(results):,} tokens, {results['settings']['decode_tokens']} decoded after them; "
        f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}.",
        "",
        "| mechanism | KV cache, MB (of dense) | tokens/s (of dense) | perplexity (Δ) | needles |",
        "|---" * 5 + "|",
    ]
    for spec, record in summaries(results).items():
        held, rate, perplexity, needles = (cell(column, record) for column in DECISIVE)
        ratio = speedup(pick(record, "decode_speedup", "median"))
        found = (f"`{spec}`", held.line, f"{rate.text} ({ratio}×)", perplexity.line)
        lines.append(f"| {' | '.join([*found, needles.small or needles.text])} |")
    return "\n".join(lines)
