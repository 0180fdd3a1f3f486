"""`foveate train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.console import app, err, out, stages, tell


@app.command()
def train(
    mechanism: Annotated[str, typer.Argument(help="name[:key=value,…] of what is to learn.")],
    file: Annotated[Path, typer.Option("--out", help="Safetensors file for what it learned.")],
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id; default: the built-in model.")
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="UTF-8 file, repeated for several tasks; default: the Python language reference.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens read of each text.")] = 16_384,
    window: Annotated[int, typer.Option(help="Tokens of one pass through the model.")] = 2048,
    steps: Annotated[
        int, typer.Option(help="Steps of training; 0: what a mechanism calibrates, that alone.")
    ] = 200,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
) -> None:
    """Train a mechanism's learned part (a gate, a router), or a layer, on a frozen model."""
    from foveate import registry
    from foveate.bench import train as training
    from foveate.hf import builtin
    from foveate.hf.convert import Conversion
    from foveate.hf.text import builtin_text, encode, read_text

    made = training.named(mechanism)
    training.check_trainable(made, steps)
    if window < 2 or tokens < window:
        raise ValueError(f"want --window >= 2 and --tokens >= --window, got {window} and {tokens}")
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"--out {file}: give a file in a directory that exists")
    contents = [read_text(path) for path in texts or []] or [builtin_text()]
    with err.status("loading the model"):
        loaded, tokenizer = builtin.load(model, progress=err.log)
    count = tokens // window
    windows = [encode(tokenizer, x, count * window).view(count, window) for x in contents]
    with stages() as told:
        result = training.train(
            loaded,
            made,
            windows,
            steps=steps,
            lr=lr,
            progress=told,
        )
    result.write(file)
    ends = result.losses[:1] + result.losses[-1:]
    done = f"trained: loss {ends[0]:.4g} -> {ends[1]:.4g}" if ends else "calibrated"
    tell(f"{done}, kept in {file}")
    if isinstance(made, Conversion):
        use = f'foveate.bench.train.load_conversion(model, "{file}", "{made.card.name}")'
    elif made.card.kind == "module":
        use = f'foveate.bench.train.load_layer("{file}", "{made.card.name}")'
    else:
        slot = "cache" if made.card.kind == "cache" else "prefill"
        taught = dataclasses.replace(made, **{made.trained: str(file)})
        use = f'foveate.attach(model, {slot}="{registry.spec_of(taught)}")'
    out.print(use, markup=False, soft_wrap=True)
