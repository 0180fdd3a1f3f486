"""`foveate tune`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import app, err, measure, out


@app.command()
def tune(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id; default: the built-in model.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file; default: the Python language reference.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length to tune for.")] = 8000,
    max_loss: Annotated[str, typer.Option(help="What may be lost, like 1%: see --metric.")] = "1%",
    metric: Annotated[
        str, typer.Option(help="perplexity (its rise), kl (1% is 0.01 nats) or needles (lost).")
    ] = "perplexity",
    specs: Annotated[
        list[str] | None, typer.Option("--with", help="A mechanism to choose from; repeat.")
    ] = None,
    searchers: Annotated[str, typer.Option(help="Of pareto, greedy, influence.")] = "",
    minutes: Annotated[float | None, typer.Option(help="End the search after so long.")] = None,
    heads: Annotated[
        Path | None,
        typer.Option(help="Record of foveate inspect whose first heads stay dense: see --keep."),
    ] = None,
    keep: Annotated[int, typer.Option(help="How many heads of --heads stay dense.")] = 20,
    folder: Annotated[Path, typer.Option("--out", help="Where plan.json goes.")] = Path(
        "foveate-plan"
    ),
    fresh: Annotated[bool, typer.Option(help="Overwrite other results in --out.")] = False,
) -> None:
    """Find the fastest plan, by layer and kv head, that loses no more than you allow."""
    from foveate.analysis.base import load_record
    from foveate.bench.tune.run import Settings, TuneRun
    from foveate.hf import builtin
    from foveate.hf.planfile import shape_of
    from foveate.hf.text import builtin_text, read_text, text_sha256
    from foveate.report.terminal import grid

    content = read_text(text) if text else builtin_text()
    chosen: dict[str, Any] = {"candidates": tuple(specs)} if specs else {}
    if searchers:
        chosen["searchers"] = tuple(searchers.split(","))
    record = load_record(heads) if heads else None
    settings = Settings(
        model=str(Path(model).resolve()) if model and Path(model).exists() else model or "built-in",
        text=str(text) if text else "Python language reference (pydoc_data.topics)",
        text_sha256=text_sha256(content),
        tokens=tokens,
        max_loss=_percent(max_loss),
        metric=metric,
        minutes=minutes,
        **chosen,
    )
    with err.status("loading the model"):
        loaded, tokenizer = builtin.load(model, progress=err.log)
    if record is not None:
        record.fit(loaded)
        kept = record.kv_heads(keep, shape_of(loaded)["kv_heads"])
        settings = dataclasses.replace(settings, kept=tuple(kept))
    job = TuneRun(loaded, tokenizer, content, settings, folder, fresh=fresh)

    def show(job: Any) -> Path:
        lines = [
            (x["searcher"], f"{100 * x['expected_share']:.0f} %", f"{x['loss']:+.2f} %")
            for x in job.data["tried"]
        ]
        out.print(grid(("searcher", "attention time", f"{metric} lost"), lines))
        return Path(job.plan_path)

    path = measure(job, show)
    found = job.data["steps"]["verdict on held-out text"]
    speed = found["prefill_speedup"]
    out.print(
        f"prefill of {tokens:,} tokens: {speed['median']:.2f}× dense attention "
        f"({speed['min']:.2f} to {speed['max']:.2f}), {found['metric']} lost on held-out text: "
        f"{found['held_out_loss_percent']:+.2f} %"
    )
    out.print(f'with foveate.attach(model, plan="{path}"): ...', style="cyan", highlight=False)
    out.print(f"plan: {path}", markup=False, highlight=False, soft_wrap=True)


def _percent(text: str) -> float:
    """A share like 1% or 1, in percent."""
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError:
        raise ValueError(f"--max-loss must be a number of percent like 1%, got {text!r}") from None
