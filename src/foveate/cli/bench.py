"""Paired timings: `foveate bench`."""

from __future__ import annotations

import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import app, err, measure, out, tell

bench_app = typer.Typer(no_args_is_help=True, help="Paired timings on this machine.")
app.add_typer(bench_app, name="bench")


@bench_app.command()
def basics(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of each pair.")] = 5,
    only: Annotated[str, typer.Option(help="Some parts, like attach,dense.")] = "",
) -> None:
    """Overhead of attaching, gain of block sparsity, cost of selection, import time, memory."""
    from foveate.bench.basics import Line
    from foveate.bench.basics import measure as basic_lines
    from foveate.hf import builtin
    from foveate.hf.text import builtin_text, encode
    from foveate.report.terminal import grid

    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")

    @cache
    def load() -> tuple[Any, Any]:
        model, tokenizer = builtin.load(None, progress=err.log)
        return model, encode(tokenizer, builtin_text(), 8000)

    lines: list[Line] = []
    try:
        with err.status("measuring, some minutes in all") as status:
            for line in basic_lines(load, rounds, tuple(filter(None, only.split(",")))):
                lines.append(line)
                status.update(f"measuring; last: {line.name}: {line.figure}")
    finally:  # what is measured is shown, whatever ends the rest
        if lines:
            head = ("bar met", "bar", "measured", "what")
            rows = [("yes" if x.met else "NO", x.bar, x.figure, x.name) for x in lines]
            out.print(grid(head, rows))


@bench_app.command()
def kernels(
    sizes: Annotated[str, typer.Option(help="Like 1k,4k,8k; default: each bench's own.")] = "",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of each trial.")] = 5,
    only: Annotated[str, typer.Option(help="Some of the benches, like attend,decode.")] = "",
    folder: Annotated[Path, typer.Option("--out", help="Where results go.")] = Path(
        "foveate-kernels"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run of a minute.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    fresh: Annotated[bool, typer.Option(help="Overwrite other results in --out.")] = False,
) -> None:
    """The kernels against their rivals and against the limits of this machine."""
    from foveate.bench import kernels as bench
    from foveate.bench.lengths import lengths_of
    from foveate.report import kernels as page

    lengths, names = lengths_of(sizes, "--sizes"), tuple(filter(None, only.split(",")))
    settings = bench.Settings(sizes=lengths, rounds=rounds, only=names, quick=quick)
    command = shlex.join(["foveate", *sys.argv[1:]])
    job = bench.KernelRun(folder, settings, command=command, fresh=fresh)

    def show(job: Any) -> Path:
        path = page.write(job.data, folder / "kernels.html")
        if markdown:
            out.print(page.markdown(job.data), markup=False, highlight=False, soft_wrap=True)
        else:
            out.print(page.terminal(job.data))
        return path

    tell(f"report: {measure(job, show)}")
