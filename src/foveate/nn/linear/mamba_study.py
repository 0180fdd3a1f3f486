"""An Empirical Study of Mamba-based Language Models (2024, paper 317)."""

from __future__ import annotations

import torch

from foveate import ops
from foveate.nn._stack import MLP, Stack
from foveate.registry import Card, register

_MAMBA, _ATTENTION, _MLP = "M*-"


def allocate_hybrid(layers: int, attention: float = 0.08, mlp: float = 0.5) -> str:
    """Sublayers as a string of M (Mamba-2), * (attention) and - (MLP), the shares given.

    Attention is spread so that the stretches before, between and after it are of equal length,
    then MLPs are spread alike over the other places. Raises ValueError for shares outside of
    [0, 1] or above 1 together.
    """
    ops.check_block("layers", layers)
    if min(attention, mlp) < 0 or attention + mlp > 1:
        raise ValueError(
            f"shares must be at least 0 and at most 1 together, got {attention:g} and {mlp:g}"
        )
    places, mlps = round(layers * attention), round(layers * mlp)
    if places + mlps > layers:
        raise ValueError(f"{places} attention layers and {mlps} MLPs are more than {layers}")
    row = [_MAMBA] * layers
    row = _spread(row, _ATTENTION, (layers - places) / (places + 1) if places else layers)
    left = row.count(_MAMBA) - mlps
    return "".join(_spread(row, _MLP, left / mlps if mlps else layers))


def _spread(row: list[str], symbol: str, stretch: float) -> list[str]:
    """A row with `symbol` after every `stretch` places of Mamba."""
    out, ahead = [], stretch
    for here in row:
        if here != _MAMBA:
            out.append(here)
        elif ahead < 0.5:
            out.append(symbol)
            ahead += stretch
        else:
            out.append(here)
            ahead -= 1
    return out


def parse_hybrid(symbols: str, mamba: str = "mamba2", attention: str = "dense") -> str:
    """The pattern of a `Stack` that a string of M, * and - stands for.

    Raises ValueError for another symbol and for none.
    """
    wrong = sorted(set(symbols) - {_MAMBA, _ATTENTION, _MLP})
    if wrong or not symbols:
        raise ValueError(f"sublayers must be a string of M, * and -, got {symbols!r}")
    names = {_MAMBA: mamba, _ATTENTION: attention, _MLP: MLP}
    return ", ".join(names[symbol] for symbol in symbols)


@register(
    Card(
        name="mamba_study",
        title="An Empirical Study of Mamba-based Language Models",
        year=2024,
        paper=317,
        claim="state spaces alone copy and look up badly; with a few attention layers, and no "
        "positions, they do better than a Transformer",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="that of Mamba-2, and O(L²·D) in the few attention layers",
        decoding="keys and values of the attention layers, the states of the others",
        confidence="high",
        small={"dim": 32, "heads": 4, "layers": 4, "attention": 0.25, "states": 8},
    )
)
class MambaStudy(Stack):
    """Residual sublayers of Mamba-2, attention without positions, and MLPs, one kind in each.

    Shares of `layers` are those of `allocate_hybrid`; `symbols` such as "M-M*-" says the order
    instead. `states` and `groups` are those of Mamba-2. Raises ValueError for shares, symbols and
    sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layers: int = 8,
        attention: float = 0.08,
        mlp: float = 0.5,
        symbols: str | None = None,
        states: int = 128,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        symbols = allocate_hybrid(layers, attention, mlp) if symbols is None else symbols
        pattern = parse_hybrid(symbols, f"mamba2:states={states},groups={groups}")
        super().__init__(dim, pattern, heads=heads, device=device, dtype=dtype)
