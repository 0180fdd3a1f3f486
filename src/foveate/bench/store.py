"""The results file: written whole after every measurement, read again to resume."""

from __future__ import annotations

import contextlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Json = dict[str, Any]
SCHEMA = "foveate.compare/2"
# Settings that measurements carry themselves: more of them leave the others as they are.
GROWING = ("specs", "lengths")


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


def write_json(path: Path, data: Json) -> None:
    """Write data as `write_text` does."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a file whole; on failure the old one stays. Raises ResultsError."""
    draft = path.with_suffix(f"{path.suffix}.part")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise ResultsError(
            f"cannot write {path}: {error.strerror}; free some space or choose another "
            "--out (what was measured before is kept)"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def read_json(path: Path, schema: str) -> Json:
    """The content of a file that `write_json` wrote; ResultsError for what is none of `schema`."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{path} cannot be read as results ({error}): remove it or use --fresh"
        ) from error
    if not isinstance(old, dict) or old.get("schema") != schema:
        raise ResultsError(
            f"{path} is not a file of this version ({schema}): choose another --out, or "
            "overwrite it with --fresh"
        )
    return old


def refuse_change(path: Path, what: str, old: Json, new: Json) -> None:
    """Raise ResultsError at the first value of `what` (like "settings") that is not as before."""
    for key, value in new.items():
        had = old.get(what, {}).get(key)
        if had != value:
            raise ResultsError(
                f"{path} was made with {key}={had}, now it is {value}: choose another --out, or "
                "overwrite it with --fresh"
            )


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
            results._resume(read_json(results.path, SCHEMA))
        results.save()
        return results

    def _resume(self, old: Json) -> None:
        settings = {k: x for k, x in self.data["settings"].items() if k not in GROWING}
        refuse_change(self.path, "settings", old, settings)
        # A plan file can be another one under the same name.
        before, after = (
            {m["spec"]: m.get("plan_sha256") for m in data["mechanisms"]}
            for data in (old, self.data)
        )
        changed = {spec for spec, plan in after.items() if before.get(spec, plan) != plan}
        self.data["measurements"] = [x for x in old["measurements"] if x["spec"] not in changed]
        self.data["created"] = old["created"]

    def save(self) -> None:
        """Write the file whole; on failure the old one stays. Raises ResultsError."""
        self.data["updated"] = now()
        write_json(self.path, self.data)

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
