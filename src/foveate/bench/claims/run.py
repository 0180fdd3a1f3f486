"""Running claims one after the other, every finished verdict on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from foveate.bench.claims import check, chosen
from foveate.bench.machine import machine
from foveate.bench.store import Json, read_json, refuse_change, write_json

SCHEMA = "foveate.claims/1"


class ClaimsRun:
    """Claims to check; verdicts already in `path`, found on an equal machine, are kept.

    Raises ValueError for an unknown name or family, and for a file of something else.
    """

    def __init__(
        self, path: Path, names: Sequence[str], family: str | None, *, fresh: bool = False
    ) -> None:
        self.path, self.machine = path, machine()
        self.wanted = chosen(names, family)
        self.data: Json = {"schema": SCHEMA, "machine": self.machine, "verdicts": {}}
        if path.exists() and not fresh:
            self._resume()
        self.resumed = sum(name in self.data["verdicts"] for _, name in self.wanted)

    def todo(self) -> list[tuple[str, Callable[[], None]]]:
        """What is not checked yet: (what it is, how to do it)."""
        held = self.data["verdicts"]
        missing = [pair for pair in self.wanted if pair[1] not in held]
        return [(f"claim of {name}", partial(self._check, kin, name)) for kin, name in missing]

    def verdicts(self) -> list[Json]:
        """The wanted verdicts that are there, in order."""
        held = self.data["verdicts"]
        return [held[name] for _, name in self.wanted if name in held]

    def finish(self) -> None:
        """Nothing is left to write: every verdict was saved when it was found."""

    def _check(self, family: str, name: str) -> None:
        self.data["verdicts"][name] = check(family, name).record()
        write_json(self.path, self.data)

    def _resume(self) -> None:
        old = read_json(self.path, SCHEMA)
        refuse_change(self.path, "machine", old, self.machine)
        self.data = old
