"""`foveate inspect`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import app, err, measure, out, tell


@app.command()
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id; default: the built-in model.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file; default: the Python language reference.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are read.")] = 1024,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this part, beside the core: repeat for several."),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where page and records go.")] = Path(
        "foveate-inspect"
    ),
) -> None:
    """See what attention does: heads, sinks, retrieval, attribution, on one page."""
    from foveate.bench.inspect.run import Inspection, check_parts
    from foveate.bench.store import check_writable
    from foveate.hf import builtin
    from foveate.hf.text import builtin_text, encode, read_text

    parts = check_parts(only)
    if tokens < 2:
        raise ValueError(f"--tokens must be at least 2, got {tokens}")
    check_writable(folder)
    content = read_text(text) if text else builtin_text()
    name = str(text) if text else "the Python language reference"
    with err.status("loading the model"):
        loaded, tokenizer = builtin.load(model, progress=err.log)
    ids = encode(tokenizer, content, tokens)
    command = shlex.join(["foveate", *sys.argv[1:]])
    job = Inspection(loaded, tokenizer, ids, name, folder, parts=parts, command=command)
    page = measure(job, _show)
    tell(f"page: {page}")


def _show(job: Any) -> Path:
    from foveate.report import inspect as page
    from foveate.report.terminal import grid

    if not job.core_done:
        raise typer.Exit(130)
    rows = [
        (m["title"], *(f"({a}, {b}) {x:.3g}" for a, b, x in m["best"])) for m in job.data["metrics"]
    ]
    out.print(grid(("measure", "largest: (layer, head) figure", "", ""), rows))
    written: Path = page.write(job.data, job.folder / "inspect.html")
    return written
