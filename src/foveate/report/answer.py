"""The answer at the top of the page, and what an unfinished run still owes."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.report.numbers import change, divergence, percent, speedup
from foveate.report.records import Record, measured, pick, summaries, worst


@dataclass(frozen=True)
class Answer:
    """One sentence around the winner's spec (empty if there is none), its figures and its code."""

    before: str
    spec: str
    after: str
    reason: str
    python: str
    facts: list[tuple[str, str]]


def answer(results: Record) -> Answer:
    """Which attention to use: the winner, dense attention, or nothing yet."""
    winner = results.get("winner")
    so_far = "" if results["complete"] else "So far: "
    if winner and winner["spec"] != "dense":
        record = summaries(results)[winner["spec"]]
        return Answer(
            before=f"{so_far}Use ",
            spec=winner["spec"],
            after=_gain(record) + _cost(record),
            reason=winner["reason"],
            python=winner["python"],
            facts=_facts(record),
        )
    if not winner and not results["complete"]:
        return Answer("No answer yet: the run stopped before it could choose.", "", "", "", "", [])
    sentence = f"Dense attention stays the best choice here, because {_why_dense(results)}."
    return Answer(so_far + sentence, "", "", winner["reason"] if winner else "", "", [])


def _gain(record: Record) -> str:
    ratio = pick(record, "end_to_end_speedup", "median")
    return "" if ratio is None else f": {speedup(ratio)}× the speed of dense attention end to end"


def _cost(record: Record) -> str:
    """What the winner costs in quality, the worse of prefill and decode."""
    loss, kl = worst(record, "perplexity_change"), worst(record, "kl")
    if loss is None or kl is None:
        return "."
    return f", at {change(loss)} perplexity and a KL of {divergence(kl)} nats."


def _why_dense(results: Record) -> str:
    speedups = {
        spec: ratio
        for spec, record in summaries(results).items()
        if spec != "dense" and (ratio := pick(record, "end_to_end_speedup", "median")) is not None
    }
    if not speedups:
        return "nothing else was measured"
    fastest = max(speedups, key=lambda spec: speedups[spec])
    if speedups[fastest] <= 1:
        return (
            f"nothing ran faster end to end (the fastest, {fastest}: {speedup(speedups[fastest])}×)"
        )
    return "no mechanism that ran faster kept the quality asked for"


def _facts(record: Record) -> list[tuple[str, str]]:
    """The winner's four figures; those that were not measured are left out."""
    ratio, loss = pick(record, "end_to_end_speedup", "median"), worst(record, "perplexity_change")
    kept, needles = pick(record, "kv_ratio"), pick(record, "needle", "accuracy")
    facts = [
        ("speed end to end", ratio, lambda x: f"{speedup(x)}×"),
        ("perplexity", loss, change),
        ("KV cache of dense", kept, lambda x: f"{percent(x)}%"),
        ("needles found", needles, lambda x: f"{percent(x)}%"),
    ]
    return [(label, show(value)) for label, value, show in facts if value is not None]


def missing(results: Record) -> list[tuple[str, str]]:
    """What is not measured yet: (spec, what) for every mechanism that lacks something."""
    lengths = results["settings"]["lengths"]
    found = []
    for mechanism in results["mechanisms"]:
        owed = {tokens: _owed(results, mechanism["spec"], tokens) for tokens in lengths}
        texts = [
            ", ".join(parts) if len(lengths) == 1 else f"at {tokens:,} tokens {', '.join(parts)}"
            for tokens, parts in owed.items()
            if parts
        ]
        if texts:
            found.append((mechanism["spec"], "; ".join(texts)))
    return found


def _owed(results: Record, spec: str, tokens: int) -> list[str]:
    settings = results["settings"]
    timings = len(list(measured(results, "timing", spec, tokens=tokens)))
    depths = {needle["depth"] for needle in measured(results, "needle", spec, tokens=tokens)}
    lost = [f"{100 * depth:g}%" for depth in settings["needle_depths"] if depth not in depths]
    parts = []
    # Dense is timed as the partner of every other mechanism, so it owes no timing of its own.
    if spec != "dense" and timings < settings["repeats"]:
        parts.append(f"timing ({timings} of {settings['repeats']} repeats)")
    if not any(measured(results, "quality", spec, tokens=tokens)):
        parts.append("quality")
    if lost:
        parts.append(f"needles at {', '.join(lost)}")
    return parts
