"""What all pages share: templates, files that go in as they are, and writing in one step."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent


def rendered(
    template: str, filters: dict[str, Callable[..., Any]] | None = None, **names: Any
) -> str:
    """A page from a template and everything that it names."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(asset=_asset, **names)


def written(page: str, path: Path) -> Path:
    """Write a page in one step: readers see the old file or the new one, never half of one."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(page, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def date_of(moment: str) -> str:
    """An ISO 8601 moment for people: "21 November 2026, 22:49 UTC"."""
    when = datetime.fromisoformat(moment.replace("Z", "+00:00")).astimezone(timezone.utc)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def _asset(name: str) -> Markup:
    """A file of ours that goes into the page as it is."""
    return Markup((HERE / name).read_text(encoding="utf-8"))
