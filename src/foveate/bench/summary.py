"""From measurements to the table: medians, ratios, the Pareto front, the winner."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import product
from statistics import median
from typing import Any

from foveate.bench.store import Json, Results

LATER = "choice sees later tokens: judge it by KL and needles, not by perplexity alone"


def summarise(results: Results) -> None:
    """Fill `summary` and `winner` from the measurements that are there."""
    data = results.data
    rows = [_row(results, entry) for entry in data["mechanisms"]]
    for row in rows:
        row["pareto"] = _on_front(row, rows)
    data["summary"] = rows
    settings = data["settings"]
    asked = product(settings["specs"], settings["lengths"])
    data["complete"] = all(_complete(results, spec, tokens) for spec, tokens in asked)
    data["winner"] = _winner(data) if data["complete"] else None
    for row in rows:
        row["winner"] = data["winner"] is not None and row["spec"] == data["winner"]["spec"]


def _complete(results: Results, spec: str, tokens: int) -> bool:
    settings, find = results.data["settings"], partial(results.find, spec=spec, tokens=tokens)
    return (
        len(find(kind="timing")) >= settings["repeats"]
        and bool(find(kind="quality"))
        and len(find(kind="needle")) >= len(settings["needle_depths"])
    )


def _spread(values: Iterable[float]) -> Json | None:
    held = list(values)
    return {"median": median(held), "min": min(held), "max": max(held)} if held else None


def _row(results: Results, entry: Json) -> Json:
    """The figures of a mechanism: those of the longest prompt, and those of every length."""
    lengths = results.data["settings"]["lengths"]
    by_length = [_figures(results, entry["spec"], tokens) for tokens in lengths]
    return {
        "spec": entry["spec"],
        **by_length[-1],
        "by_length": by_length,
        "pareto": False,
        "winner": False,
        "notes": [] if entry["selection_causal"] else [LATER],
    }


def _figures(results: Results, spec: str, tokens: int) -> Json:
    settings, find = results.data["settings"], partial(results.find, tokens=tokens)
    timings = find(kind="timing", spec=spec)
    quality, dense = (next(iter(find(kind="quality", spec=x)), None) for x in (spec, "dense"))
    depths = settings["needle_depths"]
    hits = {m["depth"]: int(m["hit"]) for m in find(kind="needle", spec=spec)}

    def ratios(*parts: str) -> Json | None:
        return _spread(
            sum(t[f"dense_{p}_seconds"] for p in parts) / sum(t[f"{p}_seconds"] for p in parts)
            for t in timings
        )

    nothing = {"prefill": None, "decode": None}
    return {
        "tokens": tokens,
        "prefill_seconds": _spread(t["prefill_seconds"] for t in timings),
        "prefill_speedup": ratios("prefill"),
        "decode_tokens_per_second": _spread(
            t["decode_tokens"] / t["decode_seconds"] for t in timings
        ),
        "decode_speedup": ratios("decode"),
        "end_to_end_speedup": ratios("prefill", "decode"),
        "kv_bytes": quality and quality["kv_bytes"],
        "kv_ratio": quality and quality["kv_bytes"] / quality["dense_kv_bytes"],
        "kv_bytes_per_token": quality
        and quality["kv_bytes"] / (tokens + settings["decode_tokens"]),
        "peak_kv_bytes": quality and quality["peak_kv_bytes"],
        "density": quality["density"] if quality else nothing,
        "retained_mass": quality["retained_mass"] if quality else nothing,
        "prefill_quality": _judged(quality, dense, "prefill"),
        "decode_quality": _judged(quality, dense, "decode"),
        "needle": {
            "accuracy": sum(hits.values()) / len(hits)
            if hits and len(hits) == len(depths)
            else None,
            "by_depth": [[d, hits.get(d)] for d in depths],
        },
    }


def _judged(quality: Json | None, dense: Json | None, phase: str) -> Json | None:
    if quality is None or dense is None:
        return None
    own, base = quality[phase], dense[phase]
    change = 100 * (own["perplexity"] / base["perplexity"] - 1)
    return {k: own[k] for k in ("perplexity", "kl", "top1")} | {"perplexity_change": change}


def cost(row: Json) -> tuple[float, float] | None:
    """Speed and distance of a mechanism: end-to-end speed-up, and the larger KL of the phases."""
    if not (row["end_to_end_speedup"] and row["prefill_quality"] and row["decode_quality"]):
        return None
    kl = max(row["prefill_quality"]["kl"], row["decode_quality"]["kl"])
    return row["end_to_end_speedup"]["median"], kl


def _on_front(row: Json, rows: list[Json]) -> bool:
    own = cost(row)
    if own is None:
        return False
    others = [c for r in rows if r is not row and (c := cost(r)) is not None]
    return not any(speed >= own[0] and kl <= own[1] and (speed, kl) != own for speed, kl in others)


def _winner(data: Json) -> Json:
    """The fastest mechanism end to end that keeps the quality; dense when none is faster."""
    settings, rows = data["settings"], data["summary"]
    dense = next(r for r in rows if r["spec"] == "dense")
    fit = [r for r in rows if not _faults(r, dense, settings)]
    best = max(fit, key=lambda r: r["end_to_end_speedup"]["median"], default=dense)
    entry = next(m for m in data["mechanisms"] if m["spec"] == best["spec"])
    if best is dense:
        reason = "no mechanism was faster end to end within the tolerated loss of quality"
    else:
        reason = (
            "it is the fastest end to end among those that raise perplexity by at most "
            f"{settings['max_loss']:g} %, stay within KL {settings['max_kl']:g} of dense attention "
            "and lose no needle"
        )
    return {"spec": best["spec"], "python": entry["python"], "reason": reason}


def _faults(row: Json, dense: Json, settings: Json) -> list[str]:
    """Why a mechanism cannot win."""
    faults = []
    if row["spec"] == "dense" or row["end_to_end_speedup"]["median"] <= 1:
        faults.append("not faster")
    for phase in ("prefill_quality", "decode_quality"):
        if row[phase]["perplexity_change"] > settings["max_loss"]:
            faults.append(f"{phase}: perplexity")
        if row[phase]["kl"] > settings["max_kl"]:
            faults.append(f"{phase}: KL")
    own: Any = row["needle"]["accuracy"]
    if own is not None and own < dense["needle"]["accuracy"]:
        faults.append("needles")
    return faults
