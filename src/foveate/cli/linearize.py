"""`foveate linearize`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from foveate.cli.console import app, err, out, stages, tell


@app.command()
def linearize(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id; default: the built-in model.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Layers to convert, counted from 0, like 3,8-11; or all.")
    ] = "all",
    spec: Annotated[
        str, typer.Option("--with", help="name[:key=value,…] of the layer that takes their place.")
    ] = "hedgehog",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file; default: the Python language reference.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are learned from.")] = 8192,
    held_out: Annotated[
        int, typer.Option(help="Tokens after them on which the figures are measured.")
    ] = 4096,
    window: Annotated[int, typer.Option(help="Tokens of one pass through the model.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps in which a layer learns to attend.")] = 200,
    lr: Annotated[float, typer.Option(help="Learning rate of these.")] = 1e-2,
    tune_steps: Annotated[
        int, typer.Option(help="Steps of fine-tuning all converted layers; 0: none.")
    ] = 100,
    tune_lr: Annotated[float, typer.Option(help="Learning rate of these.")] = 1e-3,
    file: Annotated[
        Path | None, typer.Option("--out", help="Safetensors file for the trained layers.")
    ] = None,
) -> None:
    """Make layers of a trained model linear: learn its attention, then fine-tune them."""
    from foveate.bench import linearize as job
    from foveate.hf import builtin
    from foveate.hf.convert import Conversion
    from foveate.hf.text import builtin_text, encode, read_text

    conversion = replace(Conversion.of(spec), layers=job.layers_of(layers))
    job.check_linear(conversion)
    if window < 2 or min(tokens, held_out) < window:
        raise ValueError(
            f"want --window >= 2, --tokens and --held-out >= --window, "
            f"got {window}, {tokens} and {held_out}"
        )
    if steps < 1 or tune_steps < 0:
        raise ValueError(f"want --steps >= 1 and --tune-steps >= 0, got {steps} and {tune_steps}")
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"--out {file}: give a file in a directory that exists")
    content = read_text(text) if text else builtin_text()
    with err.status("loading the model"):
        loaded, tokenizer = builtin.load(model, progress=err.log)
    counts = [tokens // window, held_out // window]
    ids = encode(tokenizer, content, sum(counts) * window).view(-1, window)
    seen, test = ids.split(counts)
    with stages() as told:
        result = job.linearize(
            loaded,
            conversion,
            seen,
            test,
            steps=steps,
            lr=lr,
            tune_steps=tune_steps,
            tune_lr=tune_lr,
            progress=told,
        )
    _show(result)
    if file is not None:
        result.write(file)
        tell(f"layers kept in {file}")
        use = f'foveate.bench.train.load_conversion(model, "{file}", "{conversion.card.name}")'
        out.print(use, markup=False, soft_wrap=True)


def _show(result: Any) -> None:
    """What was measured on held-out text: a table of layers, and one of stages."""
    by_layer = Table("layer", "KL(softmax ‖ linear), nats", "after attention transfer")
    for layer, (before, after) in result.divergence.items():
        by_layer.add_row(str(layer), f"{before:.3f}", f"{after:.3f}")
    stages = Table("held-out text", "perplexity")
    for stage, value in result.perplexity.items():
        stages.add_row(stage, f"{value:.3f}")
    out.print(by_layer)
    out.print(stages)
