"""`foveate compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import app, err, measure, out


@app.command()
def compare(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id; default: the built-in model.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file; default: the Python language reference.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 4096,
    specs: Annotated[
        list[str] | None,
        typer.Option("--with", help="[slot=]mechanism[:key=value,…][+…]; repeat for several."),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where results go.")] = Path(
        "foveate-report"
    ),
    decode_tokens: Annotated[int, typer.Option(help="Tokens decoded after the prompt.")] = 64,
    repeats: Annotated[int, typer.Option(help="Rounds of timing.")] = 3,
    needles: Annotated[int, typer.Option(help="Needle depths to try; 0 for none.")] = 5,
    needle_tokens: Annotated[
        int | None, typer.Option(help="Length of a needle prompt; default: up to 2048.")
    ] = None,
    max_loss: Annotated[float, typer.Option(help="Perplexity the winner may lose, %.")] = 1.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the pass keys.")] = 0,
    allow_long: Annotated[bool, typer.Option(help="Go beyond the model's context.")] = False,
    fresh: Annotated[bool, typer.Option(help="Overwrite other results in --out.")] = False,
) -> None:
    """Measure mechanisms against dense attention: speed, memory, quality, needles."""
    from foveate.bench.compare import DEFAULT_SPECS, Comparison, Settings, check_specs
    from foveate.bench.store import check_writable
    from foveate.hf import builtin
    from foveate.hf.text import builtin_text, read_text, text_sha256

    chosen = specs or list(DEFAULT_SPECS)
    check_specs(chosen)
    check_writable(folder)
    content = read_text(text) if text else builtin_text()
    settings = Settings(
        model=str(Path(model).resolve()) if model and Path(model).exists() else model or "built-in",
        text=str(text) if text else "Python language reference (pydoc_data.topics)",
        text_sha256=text_sha256(content),
        tokens=tokens,
        decode_tokens=decode_tokens,
        repeats=repeats,
        needle_depths=tuple(round((i + 0.5) / needles, 3) for i in range(max(needles, 0))),
        needle_tokens=needle_tokens or min(tokens, 2048),
        max_loss=max_loss,
        seed=seed,
    )
    if threads is not None:
        _set_threads(threads)
    with err.status("loading the model"):
        loaded, tokenizer = builtin.load(model, progress=err.log)
    _check_context(loaded, settings.longest(), allow_long)
    command = shlex.join(["foveate", *sys.argv[1:]])
    job = Comparison(
        loaded, tokenizer, content, settings, chosen, folder, command=command, fresh=fresh
    )
    page = measure(job, _show)
    out.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def _set_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def _check_context(model: Any, longest: int, allow_long: bool) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None or longest <= context:
        return
    message = f"{longest} tokens are beyond the model's context of {context}"
    if not allow_long:
        raise ValueError(f"{message}: ask for fewer --tokens, or go on with --allow-long")
    err.print(f"[yellow]warning:[/] {message}; quality beyond it says little")


def _show(job: Any) -> Path:
    from foveate.report import compare as page
    from foveate.report.terminal import comparison

    results = job.results
    path = page.write(results.data, results.folder / "report.html")
    out.print(comparison(results.data, out.width))
    if any(not m["selection_causal"] for m in results.data["mechanisms"]):
        out.print("† its choice sees later tokens: judge it by KL and needles", style="dim")
    winner = results.data["winner"]
    if winner:
        out.print(f"\n★ [bold]{winner['spec']}[/]: {winner['reason']}\n")
        out.print(winner["python"], style="cyan", highlight=False)
        out.print()
    return path
