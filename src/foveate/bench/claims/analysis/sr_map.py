"""Salient relevance: how much of a map is in the square that decides the class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.analysis.sr_map import SrMap
from foveate.bench.claims import Outcome
from foveate.tasks.train import fit

CLAIM = "saliency of the relevance map lies in the square that decides, more than relevance does"

_SIZE, _SQUARE, _BRIGHT, _STEPS = 24, 6, 2.0, 200


def measure() -> Outcome:
    """A network that tells bright squares from dark ones in noise, and two rules of relevance."""
    model = _trained()
    images, target, inside = _drawn(100, seed=-1)
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == target).float().mean()
    figures = {"accuracy": float(accuracy), "area of the square": float(inside.float().mean())}
    for rule in ("epsilon", "alpha-beta"):
        record = SrMap(rule=rule)(model, images, target)
        figures[f"share of |relevance|, {rule}"] = _share(record["relevance"].abs(), inside)
        figures[f"share of saliency, {rule}"] = _share(record["saliency"], inside)
    better = [
        figures[f"share of saliency, {rule}"] > figures[f"share of |relevance|, {rule}"]
        for rule in ("epsilon", "alpha-beta")
    ]
    return Outcome(figures, all(better))


def _share(maps: Tensor, inside: Tensor) -> float:
    """Mean share of a map's sum that is inside the square."""
    return float(((maps * inside).sum((1, 2)) / maps.sum((1, 2))).mean())


def _drawn(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 1, H, W) of noise with a square, its class (n,), and where it is (n, H, W)."""
    made = torch.Generator().manual_seed(seed)
    target = torch.randint(2, (rows,), generator=made)
    corner = torch.randint(_SIZE - _SQUARE, (2, rows, 1), generator=made)
    at = torch.arange(_SIZE)
    row, column = ((at >= c) & (at < c + _SQUARE) for c in corner)
    inside = row[:, :, None] & column[:, None]
    images = torch.randn(rows, _SIZE, _SIZE, generator=made)
    images = images + inside * _BRIGHT * (2.0 * target - 1)[:, None, None]
    return images[:, None], target, inside


def _trained() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * (_SIZE // 4) ** 2, 2),
        )

    def loss(step: int) -> Tensor:
        images, target, _ = _drawn(64, seed=step)
        return cross_entropy(model(images), target)

    fit(model.parameters(), loss, steps=_STEPS, lr=3e-3)
    return model.eval()
