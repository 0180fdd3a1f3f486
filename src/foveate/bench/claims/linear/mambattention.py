"""MambAttention (2025, paper 330): what it gives to share attention between the axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from foveate import create
from foveate.bench.claims import Outcome
from foveate.nn.linear.mambattention import Attend, Block, along_rows
from foveate.tasks.train import fit

CLAIM = "attention shared by time and frequency takes fewer weights and generalises better"

_DIM, _HEADS, _SIDE, _STEPS = 16, 2, 12, 120


class Apart(nn.Module):
    """A block whose attention over columns is another than that over rows."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block, self.second = block, Attend(_DIM, _HEADS)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim, H, W)."""
        x = along_rows(lambda y: self.block.rows(self.block.attend(y)), x)
        return along_rows(lambda y: self.block.columns(self.second(y)), x.mT).mT


def measure() -> Outcome:
    """Tones of 12 by 12 maps cleaned of white noise; tested on white noise and on noisy columns.

    Errors are mean squares, of maps with a mean square of about 0.5.
    """
    figures: dict[str, float] = {}
    for name in ("shared", "apart"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            options = {"depth": 1, "states": 4, "expand": 1.0}
            layer = create("mambattention", dim=_DIM, heads=_HEADS, **options)
            if name == "apart":
                layer.blocks[0] = Apart(layer.blocks[0])
            model = nn.Sequential(nn.Conv2d(1, _DIM, 1), layer, nn.Conv2d(_DIM, 1, 1))
        figures[f"weights, {name}"] = sum(p.numel() for p in layer.parameters())
        figures |= {f"error, {kind}, {name}": e for kind, e in _errors(model).items()}
    fewer = figures["weights, shared"] < figures["weights, apart"]
    better = figures["error, other noise, shared"] < figures["error, other noise, apart"]
    return Outcome(figures, fewer and better)


def _errors(model: Any) -> dict[str, float]:
    """Mean squared errors on the noise that a model was trained on, and on another."""

    def loss(step: int) -> Tensor:
        clean = _tones(8, step)
        return mse_loss(model(clean + _noise(clean.shape, step)), clean)

    fit(model.parameters(), loss, steps=_STEPS, lr=3e-3)
    clean = _tones(100, 100_000)
    with torch.no_grad():
        return {
            kind: float(mse_loss(model(clean + _noise(clean.shape, 200_000, columns)), clean))
            for kind, columns in (("same noise", False), ("other noise", True))
        }


def _tones(count: int, seed: int) -> Tensor:
    """Maps (count, 1, time, frequency) of waves along both axes."""
    made = torch.Generator().manual_seed(seed)
    pace, phase = torch.rand(2, count, 2, 1, generator=made)
    waves = torch.sin((0.5 + pace) * torch.arange(_SIDE) + 6.3 * phase)
    return (waves[:, 0, :, None] + waves[:, 1, None]).div(2**0.5)[:, None]


def _noise(shape: torch.Size, seed: int, columns: bool = False) -> Tensor:
    """White noise, or the same power in a quarter of the columns."""
    made = torch.Generator().manual_seed(seed)
    noise = 0.7 * torch.randn(shape, generator=made)
    if not columns:
        return noise
    hit = torch.rand(shape[0], 1, 1, shape[3], generator=made) < 0.25
    return 2 * noise * hit
