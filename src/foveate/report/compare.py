"""The page of `foveate compare`: one self-contained offline HTML file from one results record."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from foveate.report import decoding
from foveate.report.answer import answer, missing
from foveate.report.figures import block_maps, needle_grid, plots, styles
from foveate.report.records import longest
from foveate.report.table import GROUPS, footnotes, rows

HERE = Path(__file__).parent
SCHEMA = "foveate.compare/2"


def render(results: Mapping[str, Any]) -> str:
    """The whole page as text; missing measurements show as dashes.

    Raises ValueError when `results` is not of schema "foveate.compare/2".
    """
    if results.get("schema") != SCHEMA:
        raise ValueError(f"results: schema is {results.get('schema')!r}, expected {SCHEMA!r}")
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    template = environment.get_template("compare.html.j2")
    return template.render(asset=_asset, **_page(results))


def write(results: Mapping[str, Any], path: Path) -> Path:
    """Render to `path` in one step: readers see the old file or the new one, never half of one."""
    path = Path(path)
    page = render(results)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(page, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _page(results: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template names."""
    charts = decoding.charts(results)
    return {
        "results": results,
        "settings": results["settings"],
        "tokens": longest(results),
        "machine": results["machine"],
        "model": results["model"],
        "date": _date(results["updated"]),
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


def _date(moment: str) -> str:
    """An ISO 8601 moment for people: "21 November 2026, 22:49 UTC"."""
    when = datetime.fromisoformat(moment.replace("Z", "+00:00")).astimezone(timezone.utc)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def _breakable(spec: str) -> Markup:
    """A spec that may wrap after a colon or a comma, and nowhere else unless it must."""
    return Markup(re.sub("([:,])", r"\1<wbr>", str(escape(spec))))


def _asset(name: str) -> Markup:
    """A file of ours that goes into the page as it is."""
    return Markup((HERE / name).read_text(encoding="utf-8"))
