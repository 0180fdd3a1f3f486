"""Teaching Matters: Investigating the Role of Supervision in Vision Transformers (2022, paper 213).

On a line instead of a grid the same numbers find the previous-token heads of a language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.analysis.base import Record, describe, stacked
from foveate.hf.parts import Inputs, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register

# Sampled rows whose weights are held at once.
_CHUNK = 32


@register(
    Card(
        name="vit_heads",
        title="Teaching Matters: Investigating the Role of Supervision in Vision Transformers",
        claim="under every supervision there are heads that look at a neighbour at a fixed offset",
        kind="analysis",
        family="analysis",
        year=2022,
        paper=213,
        patterns=("noncausal self", "causal self"),
        pretrained="exact",
        cost="every map once, some rows at a time, and a window of twice the grid for each head",
        confidence="high",
    )
)
@dataclass(frozen=True, kw_only=True)
class VitHeads:
    """How heads look about on a grid of tokens that `special` tokens come before.

    grid is (rows, columns); None: a square. All but `from_special` and `from_grid`, the mean weight
    of every token for the special and for the grid's queries, leave the special tokens out, and
    rows are brought to sum 1 again (a row that saw them alone stays 0). By head: `distance`, the
    mean distance looked at on a grid of [0, 1]²; of the mean map around the query `peak`, its
    largest weight, `peak_row` and `peak_column`, where that is in tokens from the query, and
    `offset`, the distance from the query to its centre in a window of [-1, 1]²; `offset_local`,
    whether the peak is above `sharp` and not on the query itself; `deviation`, of the weights of a
    key over the queries. By layer: `head_deviation`, of weights over heads, and `similarity`, the
    linear CKA of its heads' outputs with those of every layer. Deviations are standard deviations.
    """

    grid: tuple[int, ...] | None = None
    special: int = 1
    sharp: float = 0.3

    def __post_init__(self) -> None:
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"grid must be (rows, columns), got {self.grid}")
        if self.special < 0:
            raise ValueError(f"special must be at least 0, got {self.special}")
        if not 0 < self.sharp < 1:
            raise ValueError(f"sharp must be in (0, 1), got {self.sharp}")

    @torch.no_grad()
    def __call__(self, model: Any, inputs: Inputs) -> Record:
        """Of a model on images or texts that all fill the grid; else ValueError."""
        found: dict[str, list[Tensor]] = {}
        outs: list[Tensor] = []

        def attention(seen: Seen) -> None:
            for name, value in self.of_layer(seen).items():
                found.setdefault(name, []).append(value)
            outs.append(seen.out[:, :, self.special :].transpose(1, 2).flatten(2).flatten(0, 1))

        with watch(model, attention=attention):
            run(model, inputs)
        values = {name: stacked(rows) for name, rows in found.items()}
        values["similarity"] = similarities(outs).float().cpu()
        axes = {name: ("layer", "head", "token")[: x.dim()] for name, x in values.items()}
        axes["similarity"] = ("layer", "other")
        about = describe(model, inputs, grid=self.grid, special=self.special)
        return Record("vit_heads", values, axes, "peak", about)

    def of_layer(self, seen: Seen) -> dict[str, Tensor]:
        """Statistics of one layer by head, and its `head_deviation` ()."""
        if not bool(seen.real_rows.all()):
            raise ValueError("vit_heads needs texts without padding: all must fill the grid")
        b, length = seen.q.shape[0], seen.q.shape[2]
        sides = _sides(self.grid, length - self.special)
        queries = torch.arange(length, device=seen.q.device)
        sums: dict[str, Tensor] = {}
        for some in queries[self.special :].split(_CHUNK):
            p = without(seen.rows(some), self.special)
            for name, x in of_rows(p, some - self.special, sides).items():
                sums[name] = sums.get(name, 0.0) + x
        n = length - self.special
        spread = (sums["square"] / n - (sums["key"] / n).square()).clamp_min(0).sqrt()
        special = (queries < self.special).to(seen.q)
        marks = torch.stack([special, 1 - special], -1).expand(b, 1, -1, -1)
        on = seen.columns(marks).mean(0) / marks[0].sum(1)
        return {
            "distance": sums["distance"] / (b * n),
            "deviation": spread.mean((0, 2)),
            "head_deviation": sums["heads"] / (b * n * n),
            "from_special": on[..., 0],
            "from_grid": on[..., 1],
        } | self.of_window(sums["window"] / (b * n))

    def of_window(self, window: Tensor) -> dict[str, Tensor]:
        """Of mean maps (H, 2·rows - 1, 2·columns - 1) around the query."""
        rows, columns = window.shape[1:]
        peak, at = window.flatten(1).max(1)
        row, column = at // columns - rows // 2, at % columns - columns // 2
        mass = window.sum((1, 2)).clamp_min(1e-30)
        centre = [
            (window.sum(other) * torch.linspace(-1, 1, side).to(window)).sum(1) / mass
            if side > 1
            else torch.zeros_like(mass)
            for other, side in ((2, rows), (1, columns))
        ]
        return {
            "peak": peak,
            "peak_row": row,
            "peak_column": column,
            "offset": torch.stack(centre).norm(dim=0),
            "offset_local": (peak > self.sharp) & ((row != 0) | (column != 0)),
        }


def without(p: Tensor, special: int) -> Tensor:
    """Weights (…, Lk) without those on the first `special` keys, rows brought to sum 1 again."""
    p = p[..., special:]
    total = p.sum(-1, keepdim=True)
    return p / total.masked_fill(total == 0, 1)


def of_rows(p: Tensor, at: Tensor, sides: tuple[int, int]) -> dict[str, Tensor]:
    """Sums over queries at (n,) of a grid, of their weights p (B, H, n, rows · columns)."""
    rows, columns = sides
    place = torch.arange(rows * columns, device=p.device)
    down = place // columns - (at // columns)[:, None]
    right = place % columns - (at % columns)[:, None]
    distance = torch.hypot(down / max(1, rows - 1), right / max(1, columns - 1))
    cell = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
    window = p.new_zeros(p.shape[1], (2 * rows - 1) * (2 * columns - 1))
    window.index_add_(1, cell.flatten(), p.sum(0).flatten(1))
    return {
        "distance": (p * distance).sum((0, 2, 3)),
        "window": window.view(-1, 2 * rows - 1, 2 * columns - 1),
        "key": p.sum(2),
        "square": p.square().sum(2),
        "heads": p.std(1, correction=0).sum(),
    }


def similarities(features: Sequence[Tensor]) -> Tensor:
    """Linear CKA (N, N), in [0, 1], of N features (n, ·) of the same n tokens with each other."""
    centred = [x.float() - x.float().mean(0) for x in features]
    aligned = torch.zeros(len(centred), len(centred))
    for i, x in enumerate(centred):
        for j, y in enumerate(centred[: i + 1]):
            aligned[i, j] = aligned[j, i] = (x.T @ y).double().square().sum()
    norm = aligned.diagonal().sqrt()
    return aligned / norm[:, None] / norm


def _sides(grid: tuple[int, ...] | None, tokens: int) -> tuple[int, int]:
    """Rows and columns of so many tokens; ValueError where they do not fit."""
    side = int(tokens**0.5)
    rows, columns = (side, side) if grid is None else grid
    if rows * columns != tokens or tokens < 1:
        want = "a square" if grid is None else f"{rows} x {columns}"
        raise ValueError(f"the grid must be {want}, got {tokens} tokens beside the special ones")
    return rows, columns
