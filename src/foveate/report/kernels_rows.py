"""The lines of `foveate bench kernels` as rows of text, by bench."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from foveate.report.numbers import MISSING, percent, significant, speedup
from foveate.report.records import Record, pick

# Which limit a bench is read against: decoding by bytes, everything else by arithmetic.
_BY_BYTES = ("decode",)
LIMITS = {"GEMM": "the GEMM rate", "copy": "copy bandwidth"}


@dataclass(frozen=True)
class Against:
    """One rival: the ratio over it with its spread, or why there is none."""

    name: str
    ratio: str
    spread: str
    note: str


@dataclass(frozen=True)
class Goal:
    """A goal in words, what was measured, and whether that meets it (None: not measured)."""

    text: str
    value: str
    met: bool | None


@dataclass(frozen=True)
class Row:
    """One line of the run, printed."""

    name: str
    shape: str
    time: str
    spread: str
    rate: str
    share: str
    limit: str
    ideal: str
    rivals: list[Against]
    goals: list[Goal]


def rows(results: Record) -> dict[str, list[Row]]:
    """The rows of every bench that has lines, in the order of the run."""
    found: dict[str, list[Row]] = {}
    for line in results["lines"]:
        found.setdefault(line["bench"], []).append(_row(line))
    return found


def limit_of(line: Record) -> str:
    """The limit a line is read against."""
    return "copy" if line["bench"] in _BY_BYTES else "GEMM"


def shape_of(line: Record) -> str:
    """A shape in words: length, heads, threads, density."""
    shape = line["shape"]
    heads = f"{shape['q_heads']}/{shape['kv_heads']} × {shape['dim']}"
    parts = [f"{shape['tokens']:,} tokens", heads]
    if line["bench"] == "window":
        parts.append("1 thread" if shape["threads"] == 1 else f"{shape['threads']} threads")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds, milliseconds or microseconds, whichever reads best."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 0.9995:
            return f"{significant(seconds * factor)} {unit}"
    return f"{significant(seconds * 1e6)} µs"


def _row(line: Record) -> Row:
    limit = limit_of(line)
    seconds, ideal = line["seconds"], line.get("ideal")
    rate = line["gbytes"] if limit == "copy" else line["gflops"]
    unit = "GB/s" if limit == "copy" else "GFLOP/s"
    return Row(
        name=line["name"],
        shape=shape_of(line),
        time=duration(seconds["median"]),
        spread=f"{duration(seconds['min'])} – {duration(seconds['max'])}" + _once(line),
        rate=f"{significant(rate['median'])} {unit}",
        share=f"{percent(pick(line, 'shares', limit, 'median'))} %",
        limit=LIMITS[limit],
        ideal="" if ideal is None else f"{speedup(ideal)}×",
        rivals=[_against(name, rival) for name, rival in line["rivals"].items()],
        goals=[_goal(goal) for goal in line["goals"]],
    )


def _once(held: Record) -> str:
    return ", one round" if held["rounds"] == 1 else ""


def _against(name: str, rival: Record) -> Against:
    if "skipped" in rival:
        return Against(name, MISSING, "", rival["skipped"])
    ratio, compiling = rival["ratio"], rival.get("compile_seconds")
    notes = ["one round"] if rival["rounds"] == 1 else []
    if compiling is not None and compiling >= 1:
        notes.append(f"compiled in {significant(compiling)} s")
    spread = f"{speedup(ratio['min'])} – {speedup(ratio['max'])}"
    return Against(name, f"{speedup(ratio['median'])}×", spread, ", ".join(notes))


def _goal(goal: Record) -> Goal:
    if goal["over"] in LIMITS:
        show, over = (lambda x: f"{percent(x)} %"), f"of {LIMITS[goal['over']]}"
    else:
        show, over = (lambda x: f"{speedup(x)}×"), goal["over"]
    value = MISSING if goal["value"] is None else show(goal["value"])
    return Goal(f"≥ {show(goal['bar'])} {over}", value, goal["met"])


def tally(results: Record) -> tuple[int, int]:
    """How many goals were met, of how many that were measured."""
    judged = [goal["met"] for goal in _goals(results["lines"]) if goal["met"] is not None]
    return sum(judged), len(judged)


def missed(results: Record) -> list[str]:
    """The goals that were not met, in words."""
    return [
        f"{row.name}, {row.shape}: {goal.value} where {goal.text} was the goal"
        for group in rows(results).values()
        for row in group
        for goal in row.goals
        if goal.met is False
    ]


def _goals(lines: Iterable[Record]) -> Iterable[Record]:
    return (goal for line in lines for goal in line["goals"])
