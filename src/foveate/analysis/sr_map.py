"""Beyond saliency: where a convolutional network looks, by relevance (2017, paper 260)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, unfold

from foveate import ops
from foveate.analysis._relevance import relevance
from foveate.analysis.base import Record
from foveate.registry import Card, register

# How much the distance of two patches counts less the further they are apart in the image.
_NEAR = 3.0


@register(
    Card(
        name="sr_map",
        title="Beyond saliency: understanding convolutional neural networks from saliency "
        "prediction on layer-wise relevance propagation",
        year=2017,
        paper=260,
        claim="saliency of the relevance of pixels is less noisy than the relevance itself",
        kind="analysis",
        family="analysis",
        patterns=("noncausal self",),
        pretrained="exact",
        cost="a pass there and back, and the distances of all patches of every scale",
        confidence="medium",
    )
)
@dataclass(frozen=True, kw_only=True)
class SrMap:
    """Relevance of pixels for a class, and the saliency of the patches of that map.

    Relevance spreads by the rule "epsilon", or by "alpha-beta" with beta = alpha - 1. A patch is
    salient when it differs from the `nearest` patches that are most like it, near ones counting
    more; saliency is the mean over `scales`, which shrink the map.
    """

    rule: str = "epsilon"
    eps: float = 1e-6
    alpha: float = 2.0
    patch: int = 7
    nearest: int = 64
    scales: tuple[float, ...] = (1.0, 0.8, 0.5, 0.3)

    def __post_init__(self) -> None:
        if self.rule not in ("epsilon", "alpha-beta"):
            raise ValueError(f'rule must be "epsilon" or "alpha-beta", got {self.rule!r}')
        if self.eps < 0 or self.alpha < 1:
            raise ValueError(f"eps must be at least 0 and alpha 1, got {self.eps}, {self.alpha}")
        ops.check_block("nearest", self.nearest)
        if self.patch < 1 or self.patch % 2 == 0:
            raise ValueError(f"patch must be odd, got {self.patch}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"scales must be in (0, 1], got {self.scales}")

    def __call__(self, model: nn.Sequential, image: Tensor, target: Tensor) -> Record:
        """Maps `relevance` and `saliency` (B, H, W) of images (B, C, H, W) and classes (B,).

        The model is a flat stack of Conv2d, Linear, pools, ReLU, Dropout and Flatten that ends in
        class logits; TypeError for another layer.
        """
        alpha = self.alpha if self.rule == "alpha-beta" else None
        found = relevance(list(model), image, target, eps=self.eps, alpha=alpha).sum(1)
        values = {"relevance": found, "saliency": self.saliency(found)}
        return Record("sr_map", values, dict.fromkeys(values, ("image", "row", "column")))

    def saliency(self, maps: Tensor) -> Tensor:
        """Saliency (B, H, W) in [0, 1) of maps (B, H, W), whatever their range; 0 of a constant."""
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        span = (high - low).masked_fill(high == low, 1.0)
        scaled = ((maps - low) / span)[:, None]
        size = maps.shape[1:]
        total = torch.zeros_like(scaled)
        for scale in self.scales:
            small = [max(1, round(scale * n)) for n in size]
            own = interpolate(scaled, small, mode="bilinear", antialias=True)
            total += interpolate(self._of_scale(own), size, mode="bilinear")
        return total[:, 0] / len(self.scales)

    def _of_scale(self, maps: Tensor) -> Tensor:
        """Of maps (B, 1, H, W) at their size."""
        batch, _, height, width = maps.shape
        edge = self.patch // 2
        padded = nn.functional.pad(maps, (edge,) * 4, mode="replicate")
        patches = unfold(padded, self.patch).mT
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        at = torch.stack((rows, columns), -1).flatten(0, 1).to(maps) / max(height, width)
        apart = torch.cdist(patches, patches) / self.patch / (1 + _NEAR * torch.cdist(at, at))
        # The patch itself, at distance 0, is the most alike of all.
        kept = min(self.nearest + 1, height * width)
        nearest = apart.topk(kept, largest=False).values[..., 1:]
        mean = nearest.sum(-1) / max(1, kept - 1)
        return (1 - torch.exp(-mean)).view(batch, 1, height, width)
