"""A made-up but realistic results record of `foveate compare`, for the tests of its page."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

BLOCKS = 64
DEPTHS = [0.1, 0.3, 0.5, 0.7, 0.9]
REPEATS = 5
LENGTHS = [1024, 2048, 4096]
# Seconds at the longest.
DENSE_PREFILL, DENSE_DECODE, DECODED = 11.8, 4.9, 64

# title, year, paper, choice is causal
PAPERS: dict[str, tuple[str, int | None, int | None, bool]] = {
    "dense": ("", None, None, True),
    "flexprefill": (
        "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence "
        "Inference",
        2025,
        0,
        False,
    ),
    "moba": ("MoBA: Mixture of Block Attention for Long-Context LLMs", 2025, 189, True),
    "prism": ("Prism: Spectral-Aware Block-Sparse Attention", 2026, 158, False),
    "hip": (
        "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
        2024,
        15,
        True,
    ),
    "sink_window": ("Efficient Streaming Language Models with Attention Sinks", 2024, None, True),
    "decode=tidal": (
        "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
        2025,
        238,
        True,
    ),
    "cache=snapkv:budget=512": (
        "SnapKV: LLM Knows What You are Looking for Before Generation",
        2024,
        None,
        True,
    ),
    "cache=rotate_kv:bits=4": (
        "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware "
        "Adaptive Rotations",
        2025,
        118,
        True,
    ),
}

# prefill speed-up, decode speed-up, prefill KL, decode KL, top-1 lost, perplexity change in %,
# density, retained mass, share of the KV cache, needles lost
FIGURES: dict[str, tuple[float, ...]] = {
    "dense": (1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0),
    "flexprefill": (1.74, 1.0, 0.0091, 0.0064, 0.021, 0.58, 0.27, 0.957, 1.0, 0),
    "moba": (1.52, 1.0, 0.031, 0.022, 0.046, 1.9, 0.31, 0.93, 1.0, 1),
    "prism": (1.63, 1.0, 0.0137, 0.0101, 0.028, 0.83, 0.29, 0.951, 1.0, 0),
    "hip": (1.18, 1.0, 0.024, 0.018, 0.041, 1.4, 0.24, 0.938, 1.0, 0),
    "sink_window": (1.96, 1.04, 0.19, 0.21, 0.142, 14.2, 0.08, 0.81, 1.0, 4),
    "decode=tidal": (1.0, 1.21, 0.0, 0.0042, 0.012, 0.11, 0.06, 0.968, 1.0, 0),
    "cache=snapkv:budget=512": (0.99, 1.26, 0.0, 0.047, 0.058, 2.6, 0.125, 0.9, 0.137, 2),
    "cache=rotate_kv:bits=4": (0.98, 1.07, 0.0, 0.00005, 0.003, 0.02, 1.0, 1.0, 0.161, 0),
}

PARETO = {"dense", "flexprefill", "sink_window", "decode=tidal"}


def example_results() -> dict[str, Any]:
    """A complete run of nine mechanisms at three lengths; the same numbers every time."""
    chance = random.Random(0)
    mechanisms = [_mechanism(spec) for spec in PAPERS]
    measurements = [m for n in LENGTHS for spec in PAPERS for m in _measurements(spec, n, chance)]
    python = mechanisms[1]["python"]
    return {
        "schema": "foveate.compare/2",
        "created": "2026-11-21T21:58:03+00:00",
        "updated": "2026-11-21T22:49:41+00:00",
        "complete": True,
        "command": "foveate compare --tokens 4096 --with flexprefill --with moba --with prism "
        "--with hip --with sink_window --with decode=tidal --with cache=snapkv:budget=512 "
        "--with cache=rotate_kv:bits=4",
        "settings": {
            "model": "SmolLM2-135M-Instruct",
            "text": "pydoc_data.topics",
            "text_sha256": "9f2b6c1e" * 8,
            "lengths": LENGTHS,
            "decode_tokens": DECODED,
            "repeats": REPEATS,
            "scored": 256,
            "needle_depths": DEPTHS,
            "needle_tokens": 3500,
            "max_loss": 1.0,
            "specs": list(PAPERS),
            "seed": 0,
            "dtype": "float32",
        },
        "machine": {
            "cpu": "Intel Xeon Platinum 8370C @ 2.80GHz",
            "cores": 2,
            "threads": 2,
            "memory_gib": 7.8,
            "platform": "Linux-6.8-x86_64",
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "foveate": "0.1.0",
            "backend": "torch",
        },
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "parameters": 134_515_008,
            "layers": 30,
            "heads": 9,
            "kv_heads": 3,
            "head_dim": 64,
            "context": 8192,
        },
        "mechanisms": mechanisms,
        "measurements": measurements,
        "summary": [_summary(spec, measurements) for spec in PAPERS],
        "winner": {
            "spec": "flexprefill",
            "python": python,
            "reason": "the fastest end to end within 1% of dense perplexity, with every needle "
            "that dense attention finds",
        },
    }


def interrupted_results(kept: int = 40) -> dict[str, Any]:
    """The same run stopped after `kept` measurements, before anything was summarised."""
    results = example_results()
    return results | {
        "complete": False,
        "measurements": results["measurements"][:kept],
        "summary": [],
        "winner": None,
    }


def _slot(spec: str) -> tuple[str, str]:
    """The slot a spec fills and what fills it."""
    head, sign, tail = spec.partition("=")
    return (head, tail) if sign and ":" not in head else ("prefill", spec)


def _mechanism(spec: str) -> dict[str, Any]:
    title, year, paper, causal = PAPERS[spec]
    slot, name = _slot(spec)
    return {
        "spec": spec,
        "slots": {} if spec == "dense" else {slot: f"{name}{',' if ':' in name else ':'}block=64"},
        "title": title,
        "year": year,
        "paper": paper,
        "selection_causal": causal,
        "python": f'with foveate.attach(model, {slot}="{name}"):\n    model.generate(...)',
    }


def _measurements(spec: str, tokens: int, chance: random.Random) -> list[dict[str, Any]]:
    timings = [] if spec == "dense" else [_timing(spec, tokens, i, chance) for i in range(REPEATS)]
    lost = int(FIGURES[spec][9])
    needles = [_needle(spec, depth, i >= lost, chance) for i, depth in enumerate(DEPTHS)]
    mapped = tokens == LENGTHS[-1] and spec != "cache=rotate_kv:bits=4"
    found = [*timings, _quality(spec, tokens), *needles, *([_map(spec, chance)] if mapped else [])]
    return [m | {"tokens": tokens} for m in found]


def _timing(spec: str, tokens: int, repeat: int, chance: random.Random) -> dict[str, Any]:
    def noisy(seconds: float) -> float:
        return seconds * tokens / LENGTHS[-1] * chance.gauss(1, 0.025)

    prefill, decode = FIGURES[spec][:2]
    return {
        "kind": "timing",
        "spec": spec,
        "repeat": repeat,
        "prefill_seconds": noisy(DENSE_PREFILL / prefill),
        "dense_prefill_seconds": noisy(DENSE_PREFILL),
        "decode_seconds": noisy(DENSE_DECODE / decode),
        "dense_decode_seconds": noisy(DENSE_DECODE),
        "decode_tokens": DECODED,
    }


def _quality(spec: str, tokens: int) -> dict[str, Any]:
    _, _, prefill_kl, decode_kl, lost, change, density, mass, kept, _ = FIGURES[spec]
    slot = _slot(spec)[0]
    dense_bytes = 2 * 30 * 3 * 64 * 4 * (tokens + DECODED)

    def phase(perplexity: float, kl: float, positions: int) -> dict[str, Any]:
        acts = kl > 0
        return {
            "perplexity": perplexity * (1 + change / 100 * acts),
            "kl": kl,
            "top1": 1 - lost * acts,
            "positions": positions,
        }

    def in_its_phase(value: float) -> dict[str, float | None]:
        return {
            "prefill": value if slot == "prefill" and spec != "dense" else None,
            "decode": value if slot == "decode" else None,
        }

    return {
        "kind": "quality",
        "spec": spec,
        "prefill": phase(11.42, prefill_kl, 256),
        "decode": phase(9.87, decode_kl, DECODED),
        "kv_bytes": round(dense_bytes * kept),
        "dense_kv_bytes": dense_bytes,
        "peak_kv_bytes": round(dense_bytes * min(kept + 0.05, 1)),
        "density": in_its_phase(density),
        "retained_mass": in_its_phase(mass),
    }


def _needle(spec: str, depth: float, hit: bool, chance: random.Random) -> dict[str, Any]:
    expected = str(chance.randrange(10_000, 100_000))
    answer = expected if hit else str(chance.randrange(10_000, 100_000))
    return {
        "kind": "needle",
        "spec": spec,
        "depth": depth,
        "expected": expected,
        "answer": answer,
        "hit": hit,
    }


def _map(spec: str, chance: random.Random) -> dict[str, Any]:
    density = FIGURES[spec][6]
    busy = {chance.randrange(BLOCKS) for _ in range(5)}
    rules: dict[str, Callable[[int, int], float]] = {
        "dense": lambda i, j: 1.0,
        "cache=snapkv:budget=512": lambda i, j: 1.0,
        "sink_window": lambda i, j: float(j == 0 or i - j < 5),
        "flexprefill": lambda i, j: float(j == 0 or i - j < 3 or j in busy or (i - j) % 17 == 0),
        "hip": lambda i, j: float(j == 0 or i - j < 2) or chance.choice([0, 0, 0, 0.25, 0.5, 1]),
    }
    cell = rules.get(spec, lambda i, j: float(j == i or j == 0 or chance.random() < density))
    decode = _slot(spec)[0] == "decode"
    rows = range(BLOCKS // 4) if decode else range(BLOCKS)
    return {
        "kind": "map",
        "spec": spec,
        "layer": 12,
        "head": 4,
        "phase": "decode" if decode else "prefill",
        "layers_shape": "30x9",
        "map": [[cell(i, j) if decode or j <= i else None for j in range(BLOCKS)] for i in rows],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _ratio(dense: list[float], own: list[float]) -> dict[str, float]:
    return _spread([a / b for a, b in zip(dense, own, strict=True)])


def _summary(spec: str, measurements: list[dict[str, Any]]) -> dict[str, Any]:
    by_length = [_figures(spec, n, [m for m in measurements if m["tokens"] == n]) for n in LENGTHS]
    return {
        "spec": spec,
        **by_length[-1],
        "by_length": by_length,
        "pareto": spec in PARETO,
        "winner": spec == "flexprefill",
        "notes": [] if PAPERS[spec][3] else ["choice sees later tokens: judge by KL and needles"],
    }


def _figures(spec: str, tokens: int, measurements: list[dict[str, Any]]) -> dict[str, Any]:
    own, paired = ("dense_", None) if spec == "dense" else ("", spec)
    timings = [m for m in measurements if m["kind"] == "timing" and paired in (None, m["spec"])]
    prefill = [t[f"{own}prefill_seconds"] for t in timings]
    decode = [t[f"{own}decode_seconds"] for t in timings]
    dense_prefill = [t["dense_prefill_seconds"] for t in timings]
    dense_decode = [t["dense_decode_seconds"] for t in timings]
    dense_total = list(map(sum, zip(dense_prefill, dense_decode, strict=True)))
    total = list(map(sum, zip(prefill, decode, strict=True)))
    quality = next(m for m in measurements if m["kind"] == "quality" and m["spec"] == spec)
    dense = next(m for m in measurements if m["kind"] == "quality")
    needles = [m for m in measurements if m["kind"] == "needle" and m["spec"] == spec]
    return {
        "tokens": tokens,
        "prefill_seconds": _spread(prefill),
        "prefill_speedup": _ratio(dense_prefill, prefill),
        "decode_tokens_per_second": _spread([DECODED / s for s in decode]),
        "decode_speedup": _ratio(dense_decode, decode),
        "end_to_end_speedup": _ratio(dense_total, total),
        "kv_bytes": quality["kv_bytes"],
        "kv_ratio": quality["kv_bytes"] / quality["dense_kv_bytes"],
        "kv_bytes_per_token": quality["kv_bytes"] / (tokens + DECODED),
        "peak_kv_bytes": quality["peak_kv_bytes"],
        "density": quality["density"],
        "retained_mass": quality["retained_mass"],
        **{
            f"{phase}_quality": {
                "perplexity_change": 100
                * (quality[phase]["perplexity"] / dense[phase]["perplexity"] - 1),
                **{key: quality[phase][key] for key in ("perplexity", "kl", "top1")},
            }
            for phase in ("prefill", "decode")
        },
        "needle": {
            "accuracy": sum(n["hit"] for n in needles) / len(needles),
            "by_depth": [[n["depth"], int(n["hit"])] for n in needles],
        },
    }
