"""What holds: `foveate audit`, `claims` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.console import app, err, measure, out, tell


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
def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Mechanisms; default: all.")] = None,
    family: Annotated[str | None, typer.Option(help="Only one family, like sparse.")] = None,
    file: Annotated[Path, typer.Option("--out", help="Where verdicts are kept.")] = Path(
        "foveate-claims.json"
    ),
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    fresh: Annotated[bool, typer.Option(help="Measure again what --out already holds.")] = False,
) -> None:
    """What the papers claim, each in the smallest experiment that can show it."""
    from foveate.bench.claims.run import ClaimsRun
    from foveate.report import claims as page

    job = ClaimsRun(file, tuple(names or ()), family, fresh=fresh)

    def show(job: Any) -> Path:
        out.print(page.terminal(job.verdicts()))
        if markdown:
            markdown.write_text(page.markdown(job.verdicts(), job.machine), encoding="utf-8")
        return markdown or job.path

    tell(f"claims: {measure(job, show)}")


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
