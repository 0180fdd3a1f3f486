"""What the plots of the kernels page draw, as plain data."""

from __future__ import annotations

from statistics import median
from typing import Any

from foveate.report.figures import COLOURS, SYMBOLS
from foveate.report.kernels_rows import LIMITS, duration, limit_of, rows, shape_of
from foveate.report.numbers import percent, significant
from foveate.report.records import Record


def plots(results: Record) -> dict[str, Any]:
    """Points under their roofs, and the bars of every bench."""
    benches = list(rows(results))
    return {
        "points": [_point(line, benches) for line in results["lines"]],
        "roofs": [_roof(results, threads) for threads in _threads(results)],
        "bars": {
            bench: [_bars(line) for line in results["lines"] if line["bench"] == bench]
            for bench in benches
        },
        "limits": LIMITS,
    }


def styles(results: Record) -> dict[str, tuple[int, str]]:
    """Colour number and symbol of every bench."""
    return {
        bench: (1 + i % COLOURS, SYMBOLS[i % len(SYMBOLS)]) for i, bench in enumerate(rows(results))
    }


def limits(results: Record) -> dict[str, float] | None:
    """The limits measured with all threads, medians over the trials; None before the first."""
    threads = _threads(results)
    return _roof(results, threads[-1]) if threads else None


def _threads(results: Record) -> list[int]:
    return sorted({line["shape"]["threads"] for line in results["lines"]})


def _roof(results: Record, threads: int) -> dict[str, float]:
    found = [x["limits"] for x in results["lines"] if x["shape"]["threads"] == threads]
    held = {name: median(x[name]["median"] for x in found) for name in LIMITS}
    return {"threads": threads, **held}


def _point(line: Record, benches: list[str]) -> dict[str, Any]:
    number = benches.index(line["bench"])
    shares = ", ".join(
        f"{percent(share['median'])} % of {LIMITS[name]}" for name, share in line["shares"].items()
    )
    return {
        "name": f"{line['bench']}: {line['name']}",
        "colour": 1 + number % COLOURS,
        "symbol": SYMBOLS[number % len(SYMBOLS)],
        "threads": line["shape"]["threads"],
        "x": line["flops"] / line["bytes"],
        "y": line["gflops"]["median"],
        "hover": [
            shape_of(line),
            f"{duration(line['seconds']['median'])}, "
            f"{significant(line['gflops']['median'])} GFLOP/s",
            shares,
        ],
    }


def _bars(line: Record) -> dict[str, Any]:
    goals = {goal["over"]: goal["bar"] for goal in line["goals"]}
    limit = limit_of(line)
    ratios = [
        {"name": name, "goal": goals.get(name), **rival["ratio"]}
        for name, rival in line["rivals"].items()
        if "ratio" in rival
    ]
    share = {"name": limit, "goal": goals.get(limit), **line["shares"][limit]}
    return {"label": f"{line['name']}, {shape_of(line)}", "ratios": ratios, "shares": [share]}
