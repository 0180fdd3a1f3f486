"""Claims: for each paper the smallest honest experiment whose outcome shows its direction.

One file for each, in a folder named after the family, the file named after the mechanism: `CLAIM`
says in a line what is to be seen, and `measure()` returns an `Outcome`. An experiment takes less
than three minutes, is the same every time, and a claim that fails stays in the table as failed.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveate.registry import nearest

VERDICTS = {True: "reproduced", False: "not reproduced", None: "not testable here"}


@dataclass(frozen=True)
class Outcome:
    """What an experiment saw: figures by name, and whether they show what was claimed.

    holds None: the experiment cannot tell, and `remark` says why. A remark is one sentence.
    """

    figures: dict[str, float]
    holds: bool | None
    remark: str = ""


@dataclass(frozen=True)
class Verdict:
    """One line of the table of claims."""

    name: str
    family: str
    claim: str
    verdict: str
    figures: dict[str, float]
    remark: str
    seconds: float

    def record(self) -> dict[str, Any]:
        """The line as plain data."""
        return asdict(self)


def families() -> list[str]:
    """Families that have claims."""
    return sorted({family for family, _ in _files()})


def chosen(names: Sequence[str] = (), family: str | None = None) -> list[tuple[str, str]]:
    """Claims as (family, name): all, of a family, or those named; ValueError if unknown."""
    files = _files()
    if family is not None and family not in families():
        raise ValueError(f"no claims for family {family!r}; known: {', '.join(families())}")
    for name in names:
        if name not in {known for _, known in files}:
            raise ValueError(f"no claim for {name!r}{nearest(name, sorted(n for _, n in files))}")
    return [
        (kin, name) for kin, name in files if family in (None, kin) and (not names or name in names)
    ]


def check(family: str, name: str) -> Verdict:
    """Run one experiment."""
    module = importlib.import_module(f"{__name__}.{family}.{name}")
    start = time.perf_counter()
    outcome: Outcome = module.measure()
    seconds = time.perf_counter() - start
    verdict = VERDICTS[outcome.holds]
    return Verdict(name, family, module.CLAIM, verdict, outcome.figures, outcome.remark, seconds)


def _files() -> list[tuple[str, str]]:
    """All claims as (family, name), read off the folders without importing."""
    root = Path(__file__).parent
    return [
        (path.parent.name, path.stem)
        for path in sorted(root.glob("*/*.py"))
        if not path.stem.startswith("_")
    ]
