"""HyperZ⋅Z⋅W (2024, paper 256): what kernels from coordinates are worth on small images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.bench.claims import Outcome
from foveate.nn.linear.hyperzzw import GlobalMix, HyperZZW, LocalMix
from foveate.tasks.train import fit

CLAIM = "kernels made in the context of an image classify it better than kernels made without"

_SIZE, _DIM, _STEPS = 16, 8, 150


class Fixed(LocalMix):
    """The same convolution, its kernel made of coordinates alone."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim, H, W)."""
        kernels = self.kernel()[0][:, None]
        width = kernels.shape[2]
        return torch.conv2d(x, kernels, padding=width // 2, groups=len(kernels)) + self.bias


class Nothing(GlobalMix):
    """A branch that gives nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros like x."""
        return torch.zeros_like(x)


def measure() -> Outcome:
    """Noise of 16 × 16 cells with two blobs: in which of 4 directions does the dark one lie?

    Models of two layers and a mean; with their own kernels, with local kernels that no image
    changes, and with a global branch that gives nothing.
    """
    figures = {
        "accuracy, kernels in context": _accuracy(lambda layer: None),
        "accuracy, fixed kernels": _accuracy(_fixed),
        "accuracy, no global branch": _accuracy(_without_global),
        "chance": 0.25,
    }
    mine, fixed, near, chance = figures.values()
    if mine < chance + 0.15:
        return Outcome(figures, None, "the model did not learn the task in so few steps")
    return Outcome(figures, mine > max(fixed, near))


def _fixed(layer: HyperZZW) -> None:
    for part in layer.near:
        part.__class__ = Fixed


def _without_global(layer: HyperZZW) -> None:
    layer.far.__class__ = Nothing


def _accuracy(change: Callable[[HyperZZW], None]) -> float:
    """Share of fresh images classified right after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [HyperZZW(_DIM, _SIZE, hidden=8) for _ in range(2)]
        first, head = nn.Conv2d(1, _DIM, 1), nn.Linear(_DIM, 4)
    for layer in layers:
        change(layer)
    model = nn.Sequential(first, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

    def loss(step: int) -> Tensor:
        images, labels = _images(32, step)
        return cross_entropy(model(images), labels)

    fit(model.parameters(), loss, steps=_STEPS, lr=5e-3)
    images, labels = _images(400, 100_000)
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).float().mean())


def _images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright and a dark blob of 3 × 3 cells, 5 apart along one of the axes."""
    made = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 1, _SIZE, _SIZE, generator=made)
    labels = torch.randint(4, (count,), generator=made)
    steps = torch.tensor([(0, 5), (5, 0), (0, -5), (-5, 0)])[labels]
    places = torch.randint(5, _SIZE - 8 + 1, (count, 2), generator=made)
    for image, at, step in zip(images, places, steps, strict=True):
        for (row, column), light in ((at, 1.0), (at + step, -1.0)):
            image[0, row : row + 3, column : column + 3] += light
    return images, labels
