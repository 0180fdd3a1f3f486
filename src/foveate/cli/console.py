"""What all commands share: the application, what is printed where, running a job."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which attention should this model use, on this text, on this machine?",
)
# Where nothing says how wide the terminal is (a pipe, a log), tables get the room they need.
out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)


def measure(job: Any, show: Callable[[Any], Path]) -> Path:
    """Run what is left of a job and show what it found: the page, also after an interrupt."""
    if job.resumed:
        tell(f"resuming: {job.resumed} finished measurements found in {job.path}")
    interrupted = False
    try:
        _walk(job)
    except KeyboardInterrupt:
        interrupted = True
    job.finish()
    page = show(job)
    if interrupted:
        tell(f"interrupted: what is finished is in {job.path}")
        tell("run the same command again to go on from there")
        raise typer.Exit(130)
    return page


def tell(message: str) -> None:
    """A line on standard error, whole: a path in it stays one word."""
    err.print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error; what it gives is told a stage, and how much of it is done."""
    with _bar() as bar:
        task = bar.add_task("starting", total=None)
        yield lambda stage, done, total: bar.update(
            task, description=stage, completed=done, total=total
        )


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
    )


def _walk(job: Any) -> None:
    steps = job.todo()
    with _bar() as bar:
        task = bar.add_task("measuring", total=len(steps))
        for label, step in steps:
            bar.update(task, description=label)
            step()
            bar.advance(task)
