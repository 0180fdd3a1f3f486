"""The page of `foveate compare`: one self-contained offline HTML file from one results record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from foveate.report import decoding
from foveate.report.answer import answer, missing
from foveate.report.figures import block_maps, needle_grid, plots, styles
from foveate.report.page import date_of, rendered, written
from foveate.report.records import longest
from foveate.report.table import GROUPS, footnotes, rows

SCHEMA = "foveate.compare/2"


def render(results: Mapping[str, Any]) -> str:
    """The whole page as text; missing measurements show as dashes.

    Raises ValueError when `results` is not of schema "foveate.compare/2".
    """
    if results.get("schema") != SCHEMA:
        raise ValueError(f"results: schema is {results.get('schema')!r}, expected {SCHEMA!r}")
    return rendered("compare.html.j2", {"breakable": _breakable}, **_page(results))


def write(results: Mapping[str, Any], path: Path) -> Path:
    """Render to `path`, in one step."""
    return written(render(results), path)


def _page(results: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template names."""
    charts = decoding.charts(results)
    return {
        "results": results,
        "settings": results["settings"],
        "tokens": longest(results),
        "machine": results["machine"],
        "model": results["model"],
        "date": date_of(results["updated"]),
        "answer": answer(results),
        "missing": [] if results["complete"] else missing(results),
        "groups": GROUPS,
        "rows": rows(results),
        "footnotes": footnotes(results),
        "styles": styles(results),
        "charts": [chart["title"] for chart in charts],
        "by_length": decoding.figures(results),
        "decoding": decoding.COLUMNS,
        "plots": plots(results) | {"charts": charts, "lengths": results["settings"]["lengths"]},
        "needles": needle_grid(results),
        "maps": block_maps(results),
    }


def _breakable(spec: str) -> Markup:
    """A spec that may wrap after a colon or a comma, and nowhere else unless it must."""
    return Markup(re.sub("([:,])", r"\1<wbr>", str(escape(spec))))
