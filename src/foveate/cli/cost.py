"""What a decoding step costs: `foveate cost`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from foveate import registry
from foveate.cli.console import app, out


@app.command()
def cost(
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            help="name[:key=value,…] of attention or cache; default: those made for decoding."
        ),
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.")] = 8,
    dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens in the cache.")] = 8192,
    queries: Annotated[int, typer.Option(help="Tokens decoded at once.")] = 1,
    itemsize: Annotated[int, typer.Option(help="Bytes of a number of the cache.")] = 2,
    rank: Annotated[int, typer.Option(help="Numbers of latent attention.")] = 512,
    rope: Annotated[int, typer.Option(help="Rotated numbers beside them.")] = 64,
) -> None:
    """Work, bytes read and their ratio of the attention of a decoding step, per layer and row."""
    from foveate.analysis.bottleneck import Bottleneck, latent
    from foveate.report.terminal import grid

    shape = Bottleneck(
        heads=heads, kv_heads=kv_heads, dim=dim, tokens=tokens, queries=queries, itemsize=itemsize
    )
    costs = {
        "multi-head": dataclasses.replace(shape, kv_heads=heads)(),
        f"grouped, {kv_heads} kv heads": shape(),
        "multi-query": dataclasses.replace(shape, kv_heads=1)(),
        f"latent, {rank} + {rope}": latent(
            heads, rank, rope, tokens, queries=queries, itemsize=itemsize
        ),
    }
    costs |= {spec: shape(registry.create(spec)) for spec in specs or _decoding()}
    out.print(
        grid(("attention", "MFLOP", "MB read", "FLOP / byte"), list(map(_line, costs.items())))
    )


def _decoding() -> list[str]:
    """The attention mechanisms and cache policies that are made for decoding."""
    cards = registry.find(family="decode")
    return [card.name for card in cards if card.kind in ("attention", "cache")]


def _line(named: tuple[str, Any]) -> tuple[str, ...]:
    name, found = named
    figures = (found.flops / 1e6, found.bytes / 1e6, found.intensity)
    return name, *(f"{x:,.4g}" for x in figures)
