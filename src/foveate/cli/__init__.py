"""The command line: parses, calls, prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from foveate import registry
from foveate.cli import (
    bench,
    catalog,
    checks,
    compare,
    cost,
    inspect,
    linearize,
    recall,
    train,
    tune,
)
from foveate.cli.console import app, err

__all__ = [
    "app",
    "bench",
    "catalog",
    "checks",
    "compare",
    "cost",
    "inspect",
    "linearize",
    "main",
    "recall",
    "train",
    "tune",
]

_debug = False


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(help="Python file with mechanisms of your own; it is run, so trust it."),
    ] = None,
) -> None:
    global _debug
    _debug = debug
    for path in plugin or []:
        registry.load_plugin(path)


def main() -> None:
    """Run the command line; an error is one line unless `--debug` comes before the command."""
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        if _debug:
            raise
        err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
