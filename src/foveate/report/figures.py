"""What the plots, the needle grid and the block maps draw, as plain data."""

from __future__ import annotations

from typing import Any

from foveate.report.numbers import change, divergence, percent, speedup
from foveate.report.records import Record, measured, pick, summaries, worst

COLOURS = 8
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "cross",
    "x",
    "hexagon",
)
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
NOT_VISIBLE = "."
# Which slots act in a view: the others sit on dense by construction and would only hide it.
VIEWS = {
    "end_to_end": ("end_to_end_speedup", {"prefill", "decode", "cache"}),
    "prefill": ("prefill_speedup", {"prefill"}),
    "decode": ("decode_speedup", {"decode", "cache"}),
}


def styles(results: Record) -> dict[str, tuple[int, str]]:
    """The colour number (0 is dense) and the symbol of every mechanism, the same everywhere."""
    others = [m["spec"] for m in results["mechanisms"] if m["spec"] != "dense"]
    chosen = {
        spec: (1 + i % COLOURS, SYMBOLS[(i + 1 + i // COLOURS) % len(SYMBOLS)])
        for i, spec in enumerate(others)
    }
    return {"dense": (0, SYMBOLS[0]), **chosen}


def plots(results: Record) -> dict[str, Any]:
    """The data of both plots; each mechanism carries its points in the views it acts in."""
    found, style = summaries(results), styles(results)
    mechanisms = []
    for mechanism in results["mechanisms"]:
        spec = mechanism["spec"]
        record = found[spec]
        mechanisms.append(
            {
                "spec": spec,
                "colour": style[spec][0],
                "symbol": style[spec][1],
                "winner": bool(record.get("winner")),
                "points": {view: _point(mechanism, record, view) for view in VIEWS},
                "hover": _hover(record),
                "seconds": prefill_times(results, spec),
                "median": pick(record, "prefill_seconds", "median"),
            }
        )
    return {
        "mechanisms": mechanisms,
        "fronts": {view: _front(mechanisms, found, view) for view in VIEWS},
    }


def prefill_times(results: Record, spec: str) -> list[float]:
    """The prefill seconds of every repeat; for dense those of its runs beside other mechanisms."""
    own = [timing["prefill_seconds"] for timing in measured(results, "timing", spec)]
    if own or spec != "dense":
        return own
    return [timing["dense_prefill_seconds"] for timing in measured(results, "timing")]


def _point(mechanism: Record, record: Record, view: str) -> dict[str, float] | None:
    key, slots = VIEWS[view]
    ratio = pick(record, key)
    kl = worst(record, "kl") if view == "end_to_end" else pick(record, f"{view}_quality", "kl")
    acts = mechanism["spec"] == "dense" or slots & set(mechanism["slots"])
    if not acts or pick(ratio, "median") is None or kl is None:
        return None
    return {"x": ratio["median"], "low": ratio["min"], "high": ratio["max"], "kl": kl}


def _front(mechanisms: list[dict[str, Any]], found: dict[str, Record], view: str) -> list[int]:
    """The mechanisms no other one beats on both axes, slowest first."""
    drawn = [(i, m["points"][view]) for i, m in enumerate(mechanisms) if m["points"][view]]

    def beaten(point: dict[str, float]) -> bool:
        return any(
            other["x"] >= point["x"] and other["kl"] <= point["kl"] and other != point
            for _, other in drawn
        )

    if view == "end_to_end":  # the run's own verdict, so that plot and table cannot disagree
        front = [i for i, _ in drawn if found[mechanisms[i]["spec"]].get("pareto")]
    else:
        front = [i for i, point in drawn if not beaten(point)]
    return sorted(front, key=lambda i: mechanisms[i]["points"][view]["x"])


def _hover(record: Record) -> list[str]:
    def quality(phase: str) -> str | None:
        found = pick(record, f"{phase}_quality")
        return found and (
            f"{phase}: KL {divergence(pick(found, 'kl'))}, top-1 {percent(pick(found, 'top1'))}%, "
            f"perplexity {change(pick(found, 'perplexity_change'))}"
        )

    def speed(phase: str, name: str) -> str | None:
        ratio = pick(record, f"{phase}_speedup", "median")
        return None if ratio is None else f"{name} {speedup(ratio)}×"

    names = {"end_to_end": "end to end", "prefill": "prefill", "decode": "decode"}
    speeds = [text for phase, name in names.items() if (text := speed(phase, name))]
    needles = pick(record, "needle", "accuracy")
    lines = [
        ", ".join(speeds),
        quality("prefill"),
        quality("decode"),
        None if needles is None else f"needles {percent(needles)}%",
    ]
    return [line for line in lines if line]


def needle_grid(results: Record) -> list[dict[str, Any]]:
    """One row per mechanism: a cell per depth with its hit (None: not asked) and its answer."""
    rows = []
    for spec, record in summaries(results).items():
        asked = {needle["depth"]: needle for needle in measured(results, "needle", spec)}
        cells = [_needle(asked.get(depth)) for depth in results["settings"]["needle_depths"]]
        rows.append(
            {"spec": spec, "cells": cells, "accuracy": percent(pick(record, "needle", "accuracy"))}
        )
    return rows


def _needle(record: Record | None) -> dict[str, Any]:
    if record is None:
        return {"hit": None, "said": "not asked"}
    if record["hit"]:
        return {"hit": True, "said": f"found {record['expected']}"}
    return {"hit": False, "said": f"missed {record['expected']}, answered {record['answer']!r}"}


def block_maps(results: Record) -> list[dict[str, Any]]:
    """The measured maps of every mechanism; one without cells stands for a mechanism without."""
    pictures = []
    for spec in styles(results):
        quality = next(measured(results, "quality", spec), None)
        maps = [_picture(spec, quality, drawn) for drawn in measured(results, "map", spec)]
        pictures += maps or [{"spec": spec, "cells": None}]
    return pictures


def _picture(spec: str, quality: Record | None, drawn: Record) -> dict[str, Any]:
    return {
        "spec": spec,
        "rows": len(drawn["map"]),
        "columns": len(drawn["map"][0]),
        "cells": _pack(drawn["map"]),
        "place": f"{drawn['phase']}, layer\u00a0{drawn['layer']}, head\u00a0{drawn['head']}",
        "density": _density(quality, drawn["phase"]),
    }


def _density(quality: Record | None, phase: str) -> str:
    if quality is None:
        return "density not measured"
    density = pick(quality, "density", phase)
    return "every visible pair" if density is None else f"density {percent(density)}%"


def _pack(cells: list[list[float | None]]) -> str:
    """The map row by row, a character a cell: base-36 digits for shares, a dot where unseen."""
    return "".join(NOT_VISIBLE if c is None else DIGITS[_level(c)] for row in cells for c in row)


def _level(share: float) -> int:
    """A share as 0 … 35; only an exact 0 is level 0, so that a sliver of work stays visible."""
    return 0 if share <= 0 else max(1, min(35, round(share * 35)))
