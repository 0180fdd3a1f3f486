"""The results file: written whole after every measurement, read again to resume."""

from __future__ import annotations

import contextlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Json = dict[str, Any]
SCHEMA = "foveate.compare/1"


class ResultsError(ValueError):
    """A results file that cannot be used; the message says why and what to do."""


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def check_writable(folder: Path) -> None:
    """Make `folder` if it is missing; ResultsError when nothing can be written there."""
    probe = folder / ".foveate-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ResultsError(
            f"cannot write to {folder}: {error.strerror}; choose another --out"
        ) from error


class Results:
    """Measurements in a directory, kept safe against interruption."""

    def __init__(self, folder: Path, data: Json) -> None:
        self.folder, self.data = folder, data

    @property
    def path(self) -> Path:
        """The results file."""
        return self.folder / "results.json"

    @classmethod
    def open(cls, folder: Path, data: Json, fresh: bool = False) -> Results:
        """Results in `folder`: those that lie there if they were made with the same settings.

        `data` holds everything but measurements. Raises ResultsError when other results lie there
        (and `fresh` is off) or the folder cannot be written.
        """
        results = cls(folder, data | {"measurements": [], "summary": [], "winner": None})
        check_writable(folder)
        if results.path.exists() and not fresh:
            results._resume(_read(results.path))
        results.save()
        return results

    def _resume(self, old: Json) -> None:
        for key, value in self.data["settings"].items():
            had = old.get("settings", {}).get(key)
            if key != "specs" and had != value:
                raise ResultsError(
                    f"{self.path} was made with {key}={had}, now it is {value}: choose another "
                    "--out, or overwrite it with --fresh"
                )
        self.data["measurements"] = old["measurements"]
        self.data["created"] = old["created"]

    def save(self) -> None:
        """Write the file whole; on failure the old one stays. Raises ResultsError."""
        self.data["updated"] = now()
        draft = self.path.with_suffix(".json.part")
        try:
            draft.write_text(json.dumps(self.data, indent=1, allow_nan=False), encoding="utf-8")
            draft.replace(self.path)
        except OSError as error:
            raise ResultsError(
                f"cannot write {self.path}: {error.strerror}; free some space or choose another "
                "--out (what was measured before is kept)"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def add(self, measurement: Json) -> None:
        """Keep a finished measurement."""
        self.data["measurements"].append(measurement)
        self.save()

    def find(self, **wanted: Any) -> list[Json]:
        """Measurements with the given values, in the order they were made."""
        return [
            m
            for m in self.data["measurements"]
            if all(m.get(key) == value for key, value in wanted.items())
        ]


def _read(path: Path) -> Json:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{path} cannot be read as results ({error}): remove it or use --fresh"
        ) from error
    if not isinstance(old, dict) or old.get("schema") != SCHEMA:
        raise ResultsError(
            f"{path} is not a results file of this version ({SCHEMA}): choose another --out, or "
            "overwrite it with --fresh"
        )
    return old
