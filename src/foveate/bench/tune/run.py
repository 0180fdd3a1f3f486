"""`foveate tune`: the fastest plan within a tolerance, found on one text and judged on another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foveate.bench.machine import machine
from foveate.bench.store import (
    Json,
    check_writable,
    read_json,
    refuse_change,
    write_json,
    write_text,
)
from foveate.bench.tune.influence import influence
from foveate.bench.tune.judge import Judge
from foveate.bench.tune.profile import expected_loss, seconds
from foveate.bench.tune.search import SEARCHERS
from foveate.hf.attach import attach
from foveate.hf.parts import body
from foveate.hf.planfile import Plan, shape_of
from foveate.hf.text import encode
from foveate.registry import create

SCHEMA = "foveate.tune/1"
CANDIDATES = (
    *(f"sink_window:sinks=64,window={n}" for n in (256, 512, 1024, 2048)),
    "hip:stride=8,key_block=8,budget=512,dense_layers=",
    "hip:stride=8,key_block=8,budget=1024,dense_layers=",
)
_PROFILED = 4096  # tokens of the text on which single changes are weighed
_BLOCK = 64  # of the influence by distance
_TRIALS = 6  # plans that a searcher tries
_ROUNDS = 3  # of the final timing
METRICS = ("perplexity", "kl", "needles")


@dataclass(frozen=True)
class Settings:
    """What decides a search; two runs with equal settings can share their steps.

    max_loss, in percent, bounds the rise of perplexity, 100 × KL in nats, or the needles lost;
    minutes, if given, end the search early; kept are (layer, kv head) that stay dense.
    """

    model: str
    text: str
    text_sha256: str
    tokens: int = 8000
    max_loss: float = 1.0
    metric: str = "perplexity"
    candidates: tuple[str, ...] = CANDIDATES
    searchers: tuple[str, ...] = tuple(SEARCHERS)
    minutes: float | None = None
    kept: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.max_loss <= 100:
            raise ValueError(f"max loss must be above 0 and at most 100 %, got {self.max_loss:g}")
        for name, value, known in (
            ("metric", (self.metric,), METRICS),
            ("searcher", self.searchers, tuple(SEARCHERS)),
        ):
            for item in value:
                if item not in known:
                    raise ValueError(f"unknown {name} {item!r}; known: {', '.join(known)}")
        if self.tokens < 256:
            raise ValueError(f"tokens must be at least 256, got {self.tokens}")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be above 0, got {self.minutes:g}")


class TuneRun:
    """A search for a plan; every finished step is kept in `folder`, beside the plan."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        text: str,
        settings: Settings,
        folder: Path,
        *,
        fresh: bool = False,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.path, self.plan_path = folder / "tune.json", folder / "plan.json"
        self.specs = ("dense", *settings.candidates)
        self.made = [create(spec) for spec in self.specs]
        self.judges = _judges(model, tokenizer, text, settings)
        self.started = time.monotonic()
        self.data: Json = {
            "schema": SCHEMA,
            "machine": machine(),
            "settings": _plain(settings),
            "steps": {},
            "tried": [],
        }
        check_writable(folder)
        if self.path.exists() and not fresh:
            self._resume()
        self.resumed = len(self.data["steps"])

    def todo(self) -> list[tuple[str, Callable[[], None]]]:
        """The steps that are not done yet: (what it is, how to do it)."""
        steps: dict[str, Callable[[], Any]] = {
            "seconds of every candidate": self._seconds,
            "expected loss of single changes": self._expected_loss,
        }
        if "influence" in self.settings.searchers:
            steps["influence of what lies far back"] = self._influence
        for name in self.settings.searchers:
            steps[f"search: {name}"] = partial(self._search, name)
        steps["verdict on held-out text"] = self._verdict
        return [
            (name, partial(self._step, name, step))
            for name, step in steps.items()
            if name not in self.data["steps"]
        ]

    def finish(self) -> None:
        """Save what there is."""
        write_json(self.path, self.data)

    def _step(self, name: str, step: Callable[[], Any]) -> None:
        self.data["steps"][name] = step()
        self.finish()

    def _resume(self) -> None:
        old = read_json(self.path, SCHEMA)
        for part in ("settings", "machine"):
            refuse_change(self.path, part, old, self.data[part])
        self.data = old

    def _seconds(self) -> list[float]:
        return seconds(self.model, self.judges[0].ids, self.made).tolist()

    def _expected_loss(self) -> list[Any]:
        ids = self.judges[0].ids[:, :_PROFILED]
        return expected_loss(self.model, ids, self.made).nan_to_num(posinf=-1.0).tolist()

    def _influence(self) -> list[Any]:
        ids = self.judges[0].ids[:, :_PROFILED]
        return influence(self.model, [ids], block=_BLOCK, sinks=_BLOCK).by_distance.tolist()

    def _search(self, name: str) -> None:
        """Bisect the budget, a share of what dense attention costs, by the loss it brings."""
        cost, loss = self._tables(name)
        dense, cheapest = float(cost[:, 0].sum()), float(cost.amin(1).sum())
        low, high = cheapest / dense, 1.0
        budget = low + 0.3 * (high - low)
        for _ in range(_TRIALS):
            choice = SEARCHERS[name](cost, loss, budget * dense)
            good = self._try(name, choice, cost)["loss"] <= self.settings.max_loss
            low, high = (low, budget) if good else (budget, high)
            budget = (low + high) / 2
            if self._late():
                break

    def _tables(self, name: str) -> tuple[Tensor, Tensor]:
        """Cost and loss (layers × kv heads, candidates) as a searcher sees them."""
        steps = self.data["steps"]
        loss = torch.tensor(steps["expected loss of single changes"])
        loss = torch.where(loss < 0, torch.inf, loss)
        each = torch.tensor(steps["seconds of every candidate"]) / loss.shape[1]
        cost = each.expand_as(loss).clone()
        for layer, head in self.settings.kept:  # nothing is gained there, and all is lost
            cost[layer, head, 1:], loss[layer, head, 1:] = cost[layer, head, 0], torch.inf
        if name == "influence":
            far = torch.tensor(steps["influence of what lies far back"])
            spans = [
                getattr(m, "window", None) if m.card.name == "sink_window" else None
                for m in self.made
            ]
            known = [loss[..., :1] * 0]
            known += [
                torch.full_like(known[0], torch.inf)
                if n is None
                else far[..., n // _BLOCK :].sum(-1, keepdim=True)
                for n in spans[1:]
            ]
            loss = torch.where(loss.isinf(), loss, torch.cat(known, -1))
        return cost.flatten(0, 1), loss.flatten(0, 1)

    def _try(self, name: str, choice: Tensor, cost: Tensor) -> Json:
        """The loss of a plan on the text it is tuned on."""
        rows = choice.view(-1, self._kv_heads()).tolist()
        for known in self.data["tried"]:
            if known["choice"] == rows:
                return known
        found = self.judges[0].loss(self._prefill(rows))
        share = float(cost.gather(1, choice[:, None]).sum() / cost[:, 0].sum())
        entry = {"searcher": name, "choice": rows, "expected_share": share, "loss": found}
        self.data["tried"].append(entry)
        self.finish()
        return entry

    def _verdict(self) -> Json:
        """The cheapest plan within the tolerance on both texts, timed against dense attention."""
        most = self.settings.max_loss
        fit = [x for x in self.data["tried"] if x["loss"] <= most]
        for entry in sorted(fit, key=lambda x: float(x["expected_share"])):
            prefill = self._prefill(entry["choice"])
            held_out = self.judges[1].loss(prefill)
            if held_out <= most:
                return self._write(entry, prefill, held_out)
        kv_heads = self._kv_heads()
        layers = len(self.data["steps"]["expected loss of single changes"])
        nothing: Json = {"searcher": "none", "choice": [[0] * kv_heads] * layers, "loss": 0.0}
        return self._write(nothing, self._prefill(nothing["choice"]), 0.0)

    def _write(self, entry: Json, prefill: list[str | list[str]], held_out: float) -> Json:
        ratios, times = [], []
        for _ in range(_ROUNDS):
            dense, own = self._time(None), self._time(prefill)
            ratios.append(dense / own)
            times.append(own)
        measured = {
            "tokens": self.settings.tokens,
            "metric": self.settings.metric,
            "max_loss_percent": self.settings.max_loss,
            "loss_percent": entry["loss"],
            "held_out_loss_percent": held_out,
            "prefill_speedup": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
            "prefill_seconds": median(times),
            "searcher": entry["searcher"],
            "machine": self.data["machine"],
        }
        write_text(self.plan_path, Plan(shape_of(self.model), prefill, measured).text())
        return measured

    @torch.inference_mode()
    def _time(self, prefill: list[str | list[str]] | None) -> float:
        start = time.perf_counter()
        with attach(self.model, prefill=prefill):
            body(self.model)(self.judges[1].ids, use_cache=True)
        return time.perf_counter() - start

    def _prefill(self, rows: Sequence[Sequence[int]]) -> list[str | list[str]]:
        """The plan's entries: one spec where all heads of a layer agree."""
        return [
            self.specs[row[0]] if len(set(row)) == 1 else [self.specs[c] for c in row]
            for row in rows
        ]

    def _kv_heads(self) -> int:
        return len(self.data["steps"]["expected loss of single changes"][0])

    def _late(self) -> bool:
        minutes = self.settings.minutes
        return minutes is not None and time.monotonic() - self.started > 60 * minutes


def _plain(settings: Settings) -> Json:
    """Settings as JSON has them; how long the search may take decides nothing else."""
    held: Json = json.loads(json.dumps(asdict(settings)))
    del held["minutes"]
    return held


def _judges(model: Any, tokenizer: Any, text: str, settings: Settings) -> tuple[Judge, Judge]:
    """Judges on the text to tune on and on the text held out, which follows it."""
    n = settings.tokens
    try:
        ids = encode(tokenizer, text, 2 * n + 2)
    except ValueError as error:
        raise ValueError(
            f"{error} Tuning needs {n} tokens to tune on and as many again that are held out: give "
            "a longer --text or fewer --tokens."
        ) from error
    return tuple(  # type: ignore[return-value]
        Judge(model, tokenizer, ids[:, at : at + n + 1], settings.metric) for at in (0, n + 1)
    )
