"""TensorLens: Transformer Analysis via High-Order Attention Tensors (2026, paper 229)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.analysis.base import Record, describe
from foveate.hf.frozen import Frozen, frozen_forward
from foveate.hf.parts import Inputs
from foveate.registry import Card, register


def operator(frozen: Frozen, position: int = -1) -> Tensor:
    """𝒯 at an output position, exactly: (B, width, L, width), one pull for each of its rows."""
    batch, _, width = frozen.hidden.shape
    basis = torch.eye(width, dtype=frozen.hidden.dtype, device=frozen.hidden.device)
    return torch.stack([frozen.pull(u.expand(batch, -1), position) for u in basis], 1)


def squared_norms(frozen: Frozen, probes: int, *, position: int = -1, seed: int = 0) -> Tensor:
    """Squared Frobenius norms (B, L) of the blocks of 𝒯 at a position, estimated without bias.

    Each of the `probes` (at least 1) pulls a normal random direction back.
    """
    made = torch.Generator().manual_seed(seed)
    at = frozen.hidden[:, position]
    drawn = torch.randn(probes, *at.shape, generator=made).to(at)
    return torch.stack([frozen.pull(u, position).square().sum(-1) for u in drawn]).mean(0)


@register(
    Card(
        name="tensor_lens",
        title="TensorLens: End-to-End Transformer Analysis via High-Order Attention Tensors",
        year=2026,
        paper=229,
        claim="the whole model as one linear operator tells which tokens an answer rests on",
        kind="analysis",
        family="analysis",
        patterns=("noncausal self", "causal self"),
        pretrained="exact",
        cost="a pass with gradients, and a backward pass for the answer and for every probe",
        confidence="medium-high: how the paper normalises the map is unverified",
    )
)
@dataclass(frozen=True, kw_only=True)
class TensorLens:
    """What every token of a text adds to an answer, when all that is nonlinear stays as it is.

    Weights of attention, scales of norms and gates are constants of the text; then the logit of a
    token is linear in the states that enter layer `start`. `contribution` (text, token), signed,
    sums to `logit` (text) less `bias` (text); `norm` (text, token) is the Frobenius norm of the
    operator from every token to `position`, whatever the answer, from `probes` random directions
    (0: left out).
    """

    position: int = -1
    start: int = 0
    probes: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.probes < 0:
            raise ValueError(f"probes must be at least 0, got {self.probes}")

    def __call__(self, model: Any, inputs: Inputs, token: Tensor | None = None) -> Record:
        """Of a model on token ids (B, L) or a tokenizer's batch; token (B,): the predicted one.

        Raises ValueError for a start out of range, TypeError for a model that cannot be frozen.
        """
        frozen = frozen_forward(model, inputs, start=self.start)
        token = frozen.logits(self.position).argmax(-1) if token is None else token
        parts = frozen.contributions(token, self.position)
        unembedding = model.get_output_embeddings().weight[token]
        logit = (unembedding * frozen.hidden[:, self.position]).sum(-1).detach()
        values = {"contribution": parts, "logit": logit, "bias": logit - parts.sum(-1)}
        if self.probes:
            squares = squared_norms(frozen, self.probes, position=self.position, seed=self.seed)
            values["norm"] = squares.sqrt()
        axes = {name: ("text", "token")[: x.dim()] for name, x in values.items()}
        return Record("tensor_lens", values, axes, about=describe(model, inputs, **asdict(self)))
