"""The command line: parses, calls, prints."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

from foveate import registry
from foveate.papers import papers as all_papers

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which attention should this model use, on this text, on this machine?",
)
# Where nothing says how wide the terminal is (a pipe, a log), tables get the room they need.
out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)
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
    page = _measure(job, _show)
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


def _measure(job: Any, show: Callable[[Any], Path]) -> Path:
    """Run what is left of a job and show what it found: the page, also after an interrupt."""
    if job.resumed:
        _tell(f"resuming: {job.resumed} finished measurements found in {job.path}")
    interrupted = False
    try:
        _walk(job)
    except KeyboardInterrupt:
        interrupted = True
    job.finish()
    page = show(job)
    if interrupted:
        _tell(f"interrupted: what is finished is in {job.path}")
        _tell("run the same command again to go on from there")
        raise typer.Exit(130)
    return page


def _tell(message: str) -> None:
    """A line on standard error, whole: a path in it stays one word."""
    err.print(message, markup=False, highlight=False, soft_wrap=True)


def _walk(job: Any) -> None:
    bar = Progress(
        SpinnerColumn(),
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
    )
    steps = job.todo()
    with bar:
        task = bar.add_task("measuring", total=len(steps))
        for label, step in steps:
            bar.update(task, description=label)
            step()
            bar.advance(task)


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


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Option(help=", ".join(registry.KINDS))] = None,
    family: Annotated[str | None, typer.Option(help="e.g. sparse, decode")] = None,
    pretrained: Annotated[str | None, typer.Option(help=", ".join(registry.PRETRAINED))] = None,
) -> None:
    """The mechanisms of the library."""
    from foveate.report.terminal import grid

    cards = registry.find(kind=kind, family=family, pretrained=pretrained)
    if not cards:
        raise ValueError("no mechanism matches; `foveate list` shows them all")
    lines = [
        (c.name, c.kind, c.family, " ".join(c.phases), c.pretrained, str(c.year or ""), c.claim)
        for c in cards
    ]
    head = ("name", "kind", "family", "phases", "pretrained", "year", "claim")
    out.print(grid(head, lines))


@app.command()
def show(name: str) -> None:
    """The card of one mechanism and its options."""
    from foveate.report.terminal import grid

    cls = registry.lookup(name)
    card = cls.card
    paper = f"paper {card.paper}, " if card.paper is not None else ""
    out.print(f"[bold]{card.name}[/]: {card.title} ({paper}{card.year or 'baseline'})")
    out.print(inspect.getdoc(cls) or "", highlight=False)
    facts = ("claim", "kind", "family", "patterns", "phases", "pretrained", "selection_causal")
    lines = []
    for key in (*facts, "cost", "decoding", "confidence"):
        value = getattr(card, key)
        lines.append((key, ", ".join(value) if isinstance(value, tuple) else str(value)))
    out.print(grid(("card", ""), lines))
    options = [(f.name, str(f.type), str(f.default)) for f in dataclasses.fields(cls)]
    out.print(grid(("option", "type", "default"), options))


@app.command()
def papers(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    missing: Annotated[bool, typer.Option(help="Only what is still planned.")] = False,
) -> None:
    """The papers of the field: in the library, planned, or not a mechanism."""
    from foveate.report.terminal import grid

    held = {card.paper: card.name for card in registry.find() if card.paper is not None}
    states = {p: _state(p, held) for p in all_papers()}
    chosen = [p for p in states if family is None or p.family == family]
    if not chosen:
        known = ", ".join(sorted({p.family for p in states}))
        raise ValueError(f"no paper of family {family!r}; known: {known}")
    chosen = [p for p in chosen if not missing or states[p] == "planned"]
    lines = [(str(p.number), p.family, p.short_name, p.title, states[p]) for p in chosen]
    out.print(grid(("paper", "family", "name", "title", "state"), lines))
    count = list(states.values()).count
    here = len(states) - count("planned") - count("not a mechanism")
    out.print(
        f"{len(states)} papers: {here} in the library, {count('planned')} planned, "
        f"{count('not a mechanism')} not a mechanism"
    )


def _state(paper: Any, held: dict[int, str]) -> str:
    if paper.number in held:
        return f"in the library: {held[paper.number]}"
    return "not a mechanism" if paper.family == "none" else "planned"


@app.command()
def model(
    fetch: Annotated[bool, typer.Option(help="Fetch and convert it if it is not there.")] = False,
    remove: Annotated[bool, typer.Option(help="Delete it.")] = False,
) -> None:
    """Where the built-in model is, and its size."""
    from foveate.hf import builtin

    if remove:
        out.print("removed" if builtin.remove_builtin() else "there was nothing to remove")
        return
    if fetch:
        builtin.builtin_path(progress=err.log)
    status = builtin.builtin_status()
    if status.present:
        out.print(f"{status.path}  {status.bytes / 1e6:.0f} MB")
    else:
        out.print(f"{status.path}  not there yet; `foveate model --fetch` fetches it")


@app.command()
def audit(
    names: Annotated[list[str] | None, typer.Argument(help="Mechanisms; default: all.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
) -> None:
    """Check every mechanism against every property it owes; exit code 1 if one fails."""
    from foveate.bench import audit as auditing
    from foveate.report import audit as page

    groups: dict[str, list[Any]] = {}
    with err.status("auditing") as status:
        for name, kind in auditing.audited(names or ()):
            status.update(f"auditing {name}")
            groups.setdefault(kind, []).extend(auditing.audit([name]))
    for verdicts in groups.values():
        table, notes = page.terminal(verdicts)
        out.print(table)
        for note in notes:
            out.print(note, highlight=False)
    if markdown:
        markdown.write_text(page.markdown(groups), encoding="utf-8")
    if any(cell.state == "failed" for verdicts in groups.values() for cell in verdicts):
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """What this installation runs on and whether it computes right; exit code 1 if it does not."""
    from foveate.bench import doctor as examination
    from foveate.report.terminal import grid

    out.print(grid(("this installation", ""), list(examination.facts().items())))
    checks = list(examination.checks())
    lines = [
        ("yes" if c.passed else "NO", c.name, f"{c.error:.1e}", f"{c.bound:.0e}", c.failure)
        for c in checks
    ]
    out.print(grid(("sound", "primitive", "error", "bound", "failure"), lines))
    seconds, ratio = examination.dense_speed()
    out.print(
        f"dense causal attention of 2,048 tokens: {seconds * 1e3:.0f} ms, "
        f"{ratio:.2f}× as fast as PyTorch's own"
    )
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


bench_app = typer.Typer(no_args_is_help=True, help="Paired timings on this machine.")
app.add_typer(bench_app, name="bench")


@bench_app.command()
def basics(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of each pair.")] = 5,
) -> None:
    """Overhead of attaching, gain of block sparsity, cost of selection, import time, memory."""
    from foveate.bench.basics import measure
    from foveate.hf import builtin
    from foveate.hf.text import builtin_text, encode
    from foveate.report.terminal import grid

    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    with err.status("measuring"):
        loaded, tokenizer = builtin.load(None, progress=err.log)
        ids = encode(tokenizer, builtin_text(), 4096)
        lines = list(measure(loaded, ids, rounds))
    head = ("bar met", "bar", "measured", "what")
    out.print(grid(head, [("yes" if x.met else "NO", x.bar, x.figure, x.name) for x in lines]))


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
    from foveate.report import kernels as page

    lengths, names = bench.lengths_of(sizes), tuple(filter(None, only.split(",")))
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

    _tell(f"report: {_measure(job, show)}")


def main() -> None:
    """Run the command line; an error is one line unless `--debug` comes before the command."""
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if _debug:
            raise
        err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
