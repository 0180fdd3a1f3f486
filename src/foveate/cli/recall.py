"""`foveate recall`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import app, measure, out, tell


@app.command()
def recall(
    layers: Annotated[
        list[str] | None,
        typer.Option(help='A pattern like "gla*3, dense": repeat for several; default: eight.'),
    ] = None,
    widths: Annotated[str, typer.Option(help="Widths of the models.")] = "8,16,32",
    state_sizes: Annotated[
        str, typer.Option(help="Instead: numbers kept while decoding, like 1k,4k.")
    ] = "",
    seeds: Annotated[int, typer.Option(help="Models of each kind.")] = 2,
    pairs: Annotated[int, typer.Option(help="Key-value pairs of a row.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 32,
    vocabulary: Annotated[int, typer.Option(help="Tokens there are, half of them keys.")] = 64,
    filler: Annotated[
        bool, typer.Option("--filler", help="Random tokens between questions, not blanks.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Training steps of a model.")] = 400,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 2e-2,
    folder: Annotated[Path, typer.Option("--out", help="Where results go.")] = Path(
        "foveate-recall"
    ),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    fresh: Annotated[bool, typer.Option(help="Overwrite other results in --out.")] = False,
) -> None:
    """What a state remembers: small models learn to recall, accuracy against size of state."""
    from foveate.bench.lengths import lengths_of
    from foveate.bench.recall import run as bench
    from foveate.bench.recall.learn import Recall
    from foveate.report import recall as page

    settings = bench.Settings(
        layers=tuple(layers or bench.LAYERS),
        widths=() if state_sizes else lengths_of(widths, "--widths"),
        state_sizes=lengths_of(state_sizes, "--state-sizes"),
        seeds=seeds,
        task=Recall(
            pairs=pairs, length=length, vocabulary=vocabulary, filler=filler, steps=steps, lr=lr
        ),
    )
    command = shlex.join(["foveate", *sys.argv[1:]])
    job = bench.RecallRun(folder, settings, command=command, fresh=fresh)

    def show(job: Any) -> Path:
        path = page.write(job.data, folder / "recall.html")
        if markdown:
            out.print(page.markdown(job.data), markup=False, highlight=False, soft_wrap=True)
        else:
            out.print(page.terminal(job.data))
        return path

    tell(f"report: {measure(job, show)}")
