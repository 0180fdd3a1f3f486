"""The papers of the field that foveate covers or means to cover."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Paper:
    """One paper: its number, family, the short name of its mechanism, and its title."""

    number: int
    family: str
    short_name: str
    title: str


@cache
def papers() -> tuple[Paper, ...]:
    """All papers, in the order of papers.tsv."""
    lines = files("foveate").joinpath("papers.tsv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return tuple(
        Paper(int(row["paper"]), row["family"], row["short_name"], row["title"]) for row in rows
    )
