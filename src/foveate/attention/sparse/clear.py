"""CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up (2024, paper 266)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from foveate import ops
from foveate.attention.base import Call, Result
from foveate.attention.sparse._grid import TiledGrid
from foveate.ops import Mask
from foveate.ops.tile import default_scale
from foveate.registry import Card, register


@register(
    Card(
        name="clear",
        title="CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
        year=2024,
        paper=266,
        claim="image tokens that see only a disc around them make the cost linear in the image",
        kind="attention",
        family="sparse",
        patterns=("noncausal self",),
        pretrained="fine-tune",
        phases=("prefill",),
        cost="O(L·(π·radius² + text)·D) time, O(L·D) memory",
        decoding="none: an image is attended to as a whole",
        confidence="high: official code; its variant with down-sampled keys is left out",
        small={"shape": (9, 17), "text": 4, "radius": 3.0, "block": 16},
        full={"radius": 99.0},
        exempt={
            "left padding": "a grid that lacks some of its tokens has another shape",
            "right padding": "a grid that lacks some of its tokens has another shape",
        },
    )
)
@dataclass(frozen=True, kw_only=True)
class Clear(TiledGrid):
    """Text, which comes first, sees all; image tokens see text and what is nearer than `radius`.

    `trained_keys` is the number of keys, text included, the model was trained with: logits of
    larger images are then sharpened by sqrt(log(keys) / log(trained_keys)); None leaves them.
    """

    text_first = True

    radius: float = 16.0
    trained_keys: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_keys is not None and self.trained_keys < 2:
            raise ValueError(f"trained_keys must be at least 2, got {self.trained_keys}")

    def rule(self) -> Mask:
        """The disc."""
        return ops.disc(self.shape, self.radius, start=self.start, tile=self.tile or None)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Attention under the pattern, at the scale of the image's size."""
        if self.trained_keys is not None:
            sharper = math.sqrt(math.log(k.shape[2]) / math.log(self.trained_keys))
            call.scale = sharper * default_scale(call.scale, q.shape[3])
        return super().compute(q, k, v, call)
