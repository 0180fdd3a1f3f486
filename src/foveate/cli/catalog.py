"""What there is: `foveate list`, `show`, `papers` and `model`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from foveate import registry
from foveate.cli.console import app, err, out
from foveate.papers import papers as all_papers


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
    out.print(grid(("option", "type", "default"), _options(cls)))


def _options(cls: type) -> list[tuple[str, str, str]]:
    """What a mechanism takes when it is made: name, type and default."""
    if dataclasses.is_dataclass(cls):
        return [(f.name, str(f.type), str(f.default)) for f in dataclasses.fields(cls)]
    taken = inspect.signature(cls).parameters.values()
    none = inspect.Parameter.empty
    return [(p.name, str(p.annotation), "" if p.default is none else str(p.default)) for p in taken]


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
