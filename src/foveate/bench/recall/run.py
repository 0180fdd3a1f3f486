"""A run of `foveate recall`, kept in recall.json model by model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from foveate.bench.machine import machine
from foveate.bench.recall.learn import Recall, learn, state_of
from foveate.bench.store import Results, check_writable, now, read_json, refuse_change
from foveate.nn._stack import pattern_items

SCHEMA = "foveate.recall/1"

LAYERS = (
    "dense",
    "softmax_attention:window=8",
    "linattn",
    "based",
    "gla",
    "mamba2",
    "gated_deltanet",
    "gated_deltanet, dense",
)
"""Patterns that are compared unless others are asked for."""

_NARROWEST, _STEP, _WIDEST = 8, 8, 512


@dataclass(frozen=True)
class Settings:
    """What decides a run: layer patterns, widths, seeds, and the task.

    With `state_sizes`, numbers kept while decoding, each pattern has instead the width at which
    its state comes nearest to each of them.
    """

    layers: tuple[str, ...] = LAYERS
    widths: tuple[int, ...] = (8, 16, 32)
    state_sizes: tuple[int, ...] = ()
    seeds: int = 2
    task: Recall = field(default_factory=Recall)

    def __post_init__(self) -> None:
        if not self.layers or not (self.widths or self.state_sizes):
            raise ValueError("recall needs at least one pattern of layers and one width")
        for name, values in (("seeds", (self.seeds,)), ("state sizes", self.state_sizes)):
            if min(values, default=1) < 1:
                raise ValueError(f"{name} must be at least 1, got {min(values)}")
        if any(not 2 <= width <= _WIDEST for width in self.widths):
            raise ValueError(f"widths must be from 2 to {_WIDEST}, got {list(self.widths)}")
        for pattern in self.layers:
            pattern_items(pattern)

    def models(self) -> Iterator[tuple[str, int, int]]:
        """Pattern, width and seed of every model; the narrow ones first."""
        sizes = self.state_sizes or self.widths
        for seed in range(self.seeds):
            for size in sizes:
                for pattern in self.layers:
                    width = width_for(pattern, size, self.task) if self.state_sizes else size
                    yield pattern, width, seed


def width_for(pattern: str, size: int, task: Recall) -> int:
    """The width, a multiple of 8, at which a pattern's state is nearest to `size` numbers.

    Raises ValueError when no width fits the layers.
    """
    best: tuple[float, int] | None = None
    for width in range(_NARROWEST, _WIDEST + 1, _STEP):
        try:
            held = state_of(pattern, replace(task, width=width)) / 4
        except ValueError:
            continue
        off = abs(held - size) / size
        if best is None or off < best[0]:
            best = off, width
        if held > 2 * size:
            break
    if best is None:
        raise ValueError(f"no width up to {_WIDEST} fits the layers {pattern!r}")
    return best[1]


class RecallRun(Results):
    """A run whose finished models are on disk; the next run of equal settings goes on from there.

    Raises ResultsError when `folder` cannot be written, or holds a run of other settings and
    `fresh` is off; ValueError for layers that cannot be made.
    """

    def __init__(
        self, folder: Path, settings: Settings, *, command: str = "", fresh: bool = False
    ) -> None:
        self.settings = settings
        for pattern in settings.layers:  # before anything is written
            state_of(pattern, replace(settings.task, width=max(settings.widths, default=32)))
        frame = {
            "schema": SCHEMA,
            "created": now(),
            "updated": now(),
            "complete": False,
            "command": command,
            "settings": json.loads(json.dumps(asdict(settings))),
            "machine": machine(),
            "models": [],
        }
        super().__init__(folder, frame)
        check_writable(folder)
        if self.path.exists() and not fresh:
            old = read_json(self.path, SCHEMA)
            refuse_change(self.path, "settings", old, self.data["settings"])
            self.data["models"], self.data["created"] = old["models"], old["created"]
        self.resumed = len(self.data["models"])
        self.finish()

    @property
    def path(self) -> Path:
        """The file of this run."""
        return self.folder / "recall.json"

    def todo(self) -> list[tuple[str, Callable[[], None]]]:
        """The models that are not trained yet: (what it is, how to do it)."""
        done = {(m["layers"], m["width"], m["seed"]) for m in self.data["models"]}
        return [
            (f"{pattern}, width {width}, seed {seed}", self._step(pattern, width, seed))
            for pattern, width, seed in self.settings.models()
            if (pattern, width, seed) not in done
        ]

    def finish(self) -> None:
        """Say whether everything is trained, and save."""
        self.data["complete"] = not self.todo()
        self.data["summary"] = summary(self.data["models"])
        self.save()

    def _step(self, pattern: str, width: int, seed: int) -> Callable[[], None]:
        def step() -> None:
            found = learn(pattern, replace(self.settings.task, width=width), seed=seed)
            self.data["models"].append(
                {
                    "layers": pattern,
                    "width": width,
                    "seed": seed,
                    "accuracy": found.accuracy,
                    "parameters": found.parameters,
                    "state_bytes": found.state_bytes,
                    "seconds": found.seconds,
                }
            )
            self.save()

        return step


def summary(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds for every pattern and width, in the order they were trained."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for model in models:
        groups.setdefault((model["layers"], model["width"]), []).append(model)
    lines = []
    for (pattern, width), members in groups.items():
        found = [m["accuracy"] for m in members]
        lines.append(
            {
                "layers": pattern,
                "width": width,
                "seeds": len(found),
                "accuracy": mean(found),
                "spread": stdev(found) if len(found) > 1 else None,
                "low": min(found),
                "high": max(found),
                "parameters": members[0]["parameters"],
                "state_bytes": members[0]["state_bytes"],
                "seconds": mean(m["seconds"] for m in members),
            }
        )
    return lines
