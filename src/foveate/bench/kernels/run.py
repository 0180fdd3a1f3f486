"""A run of the benches, kept in kernels.json trial by trial."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from foveate import native
from foveate.bench.kernels.benches import BENCHES
from foveate.bench.kernels.rivals import LONGEST, LONGEST_COMPILED
from foveate.bench.kernels.trial import Limits, Trial, measure
from foveate.bench.machine import machine
from foveate.bench.store import Results, check_writable, now, read_json, refuse_change

SCHEMA = "foveate.kernels/1"
_SHORTEST, _LONGEST = 64, 1 << 20
# Side of the matrices and megabytes of the copy that are the limits; those of a quick run.
_LIMITS, _QUICK_LIMITS = (2048, 256), (512, 64)


@dataclass(frozen=True)
class Settings:
    """What decides a run: lengths (none: those of each bench), rounds, benches (none: all).

    quick: for a smoke run: short lengths, two rounds, nothing compiled; its figures say little.
    """

    sizes: tuple[int, ...] = ()
    rounds: int = 5
    only: tuple[str, ...] = ()
    quick: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        unknown = [name for name in self.only if name not in BENCHES]
        if unknown:
            raise ValueError(f"unknown bench {unknown[0]!r}; known: {', '.join(BENCHES)}")
        wrong = [n for n in self.sizes if not _SHORTEST <= n <= _LONGEST]
        if wrong:
            raise ValueError(f"sizes must be from {_SHORTEST} to {_LONGEST:,}, got {wrong[0]:,}")

    def trials(self) -> list[Trial]:
        """All trials, in order."""
        sizes = tuple(sorted(set(self.sizes))) or ((1024,) if self.quick else ())
        chosen = [name for name in BENCHES if not self.only or name in self.only]
        return [trial for name in chosen for trial in BENCHES[name](sizes, self.quick)]


class KernelRun(Results):
    """A run whose finished lines are on disk; the next run with equal settings goes on from there.

    Raises ResultsError when `folder` cannot be written, or holds a run of other settings or of
    another machine and `fresh` is off.
    """

    def __init__(
        self, folder: Path, settings: Settings, *, command: str = "", fresh: bool = False
    ) -> None:
        self.settings = settings
        self._limits: Limits | None = None
        here = machine() | {"isa": native.isa()}
        frame = {
            "schema": SCHEMA,
            "created": now(),
            "updated": now(),
            "complete": False,
            "command": command,
            "settings": json.loads(json.dumps(asdict(settings))),
            "machine": here,
            "notes": _notes(settings),
            "lines": [],
        }
        super().__init__(folder, frame)
        check_writable(folder)
        if self.path.exists() and not fresh:
            self._go_on()
        self.resumed = len(self.data["lines"])
        self.finish()

    @property
    def path(self) -> Path:
        """The file of this run."""
        return self.folder / "kernels.json"

    def todo(self) -> list[tuple[str, Callable[[], None]]]:
        """The trials that are not measured yet: (what it is, how to do it)."""
        done = {line["trial"] for line in self.data["lines"]}
        return [
            (trial.label, self._step(trial))
            for trial in self.settings.trials()
            if trial.label not in done
        ]

    def finish(self) -> None:
        """Say whether everything is measured, and save."""
        self.data["complete"] = not self.todo()
        self.save()

    def _step(self, trial: Trial) -> Callable[[], None]:
        def step() -> None:
            quick = self.settings.quick
            if self._limits is None:
                self._limits = Limits(*(_QUICK_LIMITS if quick else _LIMITS))
            rounds = min(self.settings.rounds, 2) if quick else self.settings.rounds
            self.data["lines"] += measure(trial, self._limits, rounds)
            self.save()

        return step

    def _go_on(self) -> None:
        """Take over the lines that are in the folder; refuses those of another run."""
        old = read_json(self.path, SCHEMA)
        for part in ("settings", "machine"):
            refuse_change(self.path, part, old, self.data[part])
        self.data["lines"], self.data["created"] = old["lines"], old["created"]


def _notes(settings: Settings) -> Sequence[str]:
    """What a reader of the figures must know."""
    notes = [
        "All contenders of a trial and the limits run in turn, round by round, in one process; "
        "ratios and shares are medians over rounds.",
        f"Dense rivals are measured up to {LONGEST:,} tokens, FlexAttention up to "
        f"{LONGEST_COMPILED:,}; what takes long runs fewer rounds, at least one.",
        "Useful work only: 4·D·pairs for visible or chosen pairs, the recurrence itself for scan; "
        "bytes are each input and output once.",
        "Copy bandwidth counts bytes read and written; decoding only reads, so its share can "
        "exceed 100 %.",
        "Decoding reads one cache after the other, as layers do, so that none is found in the "
        "processor's own cache where this can be avoided.",
    ]
    if settings.quick:
        notes.insert(0, "A quick run: it shows that everything works, its figures say little.")
    return notes
