"""APE: documents read apart from each other, attended to together (2025, paper 96)."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.attention._shared import SharedPrefix
from foveate.registry import Card, register

_ABSENT = "acts on documents that were read apart; without any it is dense attention"


@register(
    Card(
        name="ape",
        title="APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding",
        claim="documents read in advance, each on its own, serve nearly as well as read in order "
        "once a temperature and a scale align their attention",
        kind="attention",
        family="decode",
        year=2025,
        paper=96,
        cost="reading documents costs the sum of their squared lengths, once; then O(all tokens) "
        "a step",
        decoding="documents held once for all requests; positions go on from the longest of them",
        confidence="high: the released code, which raises the documents' weight to the power "
        "temperature · scale",
        exempt={"acts": _ABSENT, "full budget = dense": _ABSENT},
    )
)
@dataclass(frozen=True, kw_only=True)
class APE(SharedPrefix):
    """Attention to documents at a `temperature`, their weight raised to temperature · `scale`.

    Both lie in (0, 1]; at 1 and 1 it is plain parallel encoding, and with a single document
    ordinary attention. A temperature below 1 sharpens attention among the documents' tokens, a
    scale below 1 lessens their share. The documents come from `foveate.prefix(model, text,
    documents=…)`, by way of `attach(model, prefix=…)`, or as `Call.shared`.
    """

    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")

    def temper(self) -> tuple[float, float]:
        """The temperature, and the power of the documents' weight."""
        return self.temperature, self.temperature * self.scale
