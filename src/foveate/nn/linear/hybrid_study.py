"""A Systematic Analysis of Hybrid Linear Attention (2025, paper 273)."""

from __future__ import annotations

from typing import Any

import torch

from foveate import ops
from foveate.nn._stack import Stack
from foveate.registry import Card, register


def hybrid_pattern(
    layers: int,
    ratio: int | None,
    mixer: str = "gated_deltanet",
    attention: str = "dense",
) -> str:
    """The pattern of a `Stack` with one attention layer after every `ratio` linear ones.

    Where fewer layers than a period leave no place for one, the last layer is it; ratio None is
    linear layers alone, 0 attention alone. Raises ValueError for a negative ratio.
    """
    ops.check_block("layers", layers)
    if ratio is None:
        return ", ".join([mixer] * layers)
    if ratio < 0:
        raise ValueError(f"ratio must be at least 0, got {ratio}")
    full = [(i + 1) % (ratio + 1) == 0 for i in range(layers)]
    full[-1] = full[-1] or not any(full)
    return ", ".join(attention if here else mixer for here in full)


@register(
    Card(
        name="hybrid_study",
        title="A Systematic Analysis of Hybrid Linear Attention",
        year=2025,
        paper=273,
        claim="a few attention layers among linear ones bring recall back, whatever the mixer; "
        "language modelling hardly depends on their share",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="that of the mixer, and O(L²·D) in one of ratio + 1 layers",
        decoding="keys and values of the attention layers, the states of the others",
        confidence="high on claims, medium on the list of ratios",
        small={"dim": 32, "heads": 4, "mixer": "linattn", "ratio": 1, "layers": 2},
    )
)
class HybridStudy(Stack):
    """Residual layers: `ratio` of a linear mixer, then one of softmax attention, and so on.

    mixer names any sequence layer; `ratio` None has no attention. Attention heads rotate by their
    positions where `theta` is not None. `mlp` is the inner width of the MLP after each layer
    (None: 4 dim). Raises ValueError for an unknown mixer and for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mixer: str = "gated_deltanet",
        ratio: int | None = 3,
        layers: int = 4,
        mlp: int | None = None,
        theta: float | None = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            hybrid_pattern(layers, ratio, mixer),
            heads=heads,
            mlp=4 * dim if mlp is None else mlp,
            theta=theta,
            **made,
        )
