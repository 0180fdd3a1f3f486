"""`foveate compare`."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import app, err, measure, out, tell


@app.command()
def compare(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id; default: the built-in model.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file; default: the Python language reference.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Length of the prompt; several, like 1k,2k,4k: each in turn.")
    ] = "4096",
    specs: Annotated[
        list[str] | None,
        typer.Option("--with", help="[slot=]mechanism[:key=value,…][+…]; repeat for several."),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where results go.")] = Path(
        "foveate-report"
    ),
    decode_tokens: Annotated[int, typer.Option(help="Tokens decoded after the prompt.")] = 128,
    repeats: Annotated[int, typer.Option(help="Rounds of timing.")] = 3,
    needles: Annotated[int, typer.Option(help="Needle depths to try; 0 for none.")] = 5,
    needle_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest needle prompt, none is longer than the prompt; default: 2048, or with "
            "several lengths the longest."
        ),
    ] = None,
    max_loss: Annotated[float, typer.Option(help="Perplexity the winner may lose, %.")] = 1.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the pass keys.")] = 0,
    allow_long: Annotated[bool, typer.Option(help="Go beyond the model's context.")] = False,
    fresh: Annotated[bool, typer.Option(help="Overwrite other results in --out.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print what decides between caches as Markdown.")
    ] = False,
) -> None:
    """Measure mechanisms against dense attention: speed, memory, quality, needles."""
    from foveate.bench.compare import DEFAULT_SPECS, Comparison, Settings, check_specs
    from foveate.bench.lengths import lengths_of
    from foveate.bench.store import check_writable
    from foveate.hf import builtin
    from foveate.hf.text import builtin_text, read_text, text_sha256

    chosen = specs or list(DEFAULT_SPECS)
    check_specs(chosen)
    lengths = tuple(sorted(set(lengths_of(tokens, "--tokens"))))
    if needle_tokens is None:
        needle_tokens = lengths[-1] if len(lengths) > 1 else 2048
    check_writable(folder)
    content = read_text(text) if text else builtin_text()
    settings = Settings(
        model=str(Path(model).resolve()) if model and Path(model).exists() else model or "built-in",
        text=str(text) if text else "Python language reference (pydoc_data.topics)",
        text_sha256=text_sha256(content),
        lengths=lengths,
        decode_tokens=decode_tokens,
        repeats=repeats,
        needle_depths=tuple(round((i + 0.5) / needles, 3) for i in range(max(needles, 0))),
        needle_tokens=needle_tokens,
        max_loss=max_loss,
        seed=seed,
    )
    if threads is not None:
        _set_threads(threads)
    with err.status("loading the model"):
        loaded, tokenizer = builtin.load(model, progress=err.log)
    _check_context(loaded, settings, allow_long)
    command = shlex.join(["foveate", *sys.argv[1:]])
    job = Comparison(
        loaded, tokenizer, content, settings, chosen, folder, command=command, fresh=fresh
    )
    page = measure(job, partial(_show, markdown=markdown))
    tell(f"report: {page}")


def _set_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def _check_context(model: Any, settings: Any, allow_long: bool) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = settings.longest()
    if context is None or longest <= context:
        return
    message = f"{longest} tokens are beyond the model's context of {context}"
    if not allow_long:
        most = settings.lengths[-1] + context - longest
        raise ValueError(f"{message}: ask for --tokens of at most {most}, or add --allow-long")
    err.print(f"[yellow]warning:[/] {message}; quality beyond it says little")


def _show(job: Any, markdown: bool) -> Path:
    from foveate.report import compare as page
    from foveate.report import terminal
    from foveate.report.decoding import markdown as decisive

    results = job.results
    path = page.write(results.data, results.folder / "report.html")
    if markdown:
        out.print(decisive(results.data), markup=False, highlight=False, soft_wrap=True)
        return path
    out.print(terminal.comparison(results.data, out.width))
    cached = any("cache" in m["slots"] for m in results.data["mechanisms"])
    if cached or len(results.data["settings"]["lengths"]) > 1:
        out.print(terminal.decoding(results.data, out.width))
    if any(not m["selection_causal"] for m in results.data["mechanisms"]):
        out.print("† its choice sees later tokens: judge it by KL and needles", style="dim")
    winner = results.data["winner"]
    if winner:
        out.print(f"\n★ [bold]{winner['spec']}[/]: {winner['reason']}\n")
        out.print(winner["python"], style="cyan", highlight=False)
        out.print()
    return path
