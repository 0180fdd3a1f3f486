"""Attention Lens: what every head says, in words of the vocabulary (2023, paper 205)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from foveate import ops
from foveate.hf.parts import Inputs, Parts, head_logits, real_tokens, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register

# Steps between two looks at the texts held out, and how many without a gain end the training.
_EVERY, _PATIENCE = 10, 3
# One position in so many is held out.
_HELD = 8


class Positions(NamedTuple):
    """Real tokens: outputs of a layer's heads (n, Hq, Dv), last hidden states (n, width)."""

    outputs: Tensor
    hidden: Tensor

    def at(self, which: Tensor) -> Positions:
        """Some of them."""
        return Positions(self.outputs[which], self.hidden[which])


class Lens(nn.Module):
    """Maps of what each head adds to the stream to logits: the unembedding and a low-rank change.

    Maps have a bias (Hq, vocabulary); `losses` are the divergences (nats) of the positions held
    out, the first that of the plain unembedding.
    """

    def __init__(self, model: Any, layer: int, rank: int, made: torch.Generator) -> None:
        super().__init__()
        parts = Parts(model)
        self.parts, self.layer = parts, layer % parts.layers
        self.losses: list[float] = []
        self.unembedding: Tensor = model.get_output_embeddings().weight.detach()
        words, width = self.unembedding.shape
        self.down = nn.Parameter(0.02 * torch.randn(parts.heads, rank, width, generator=made))
        self.up = nn.Parameter(torch.zeros(parts.heads, words, rank))
        self.bias = nn.Parameter(torch.zeros(parts.heads, words))

    @torch.no_grad()
    def collect(self, inputs: Inputs) -> Positions:
        """Every real token of token ids (B, L) or a tokenizer's batch."""
        real, found = real_tokens(inputs), []

        def attention(seen: Seen) -> None:
            if seen.layer == self.layer:
                found.append(seen.out.transpose(1, 2)[real])

        with watch(self.parts.model, attention=attention):
            hidden = run(self.parts.model, inputs)
        return Positions(found[0], hidden[real])

    @torch.no_grad()
    def contributions(self, positions: Positions) -> Tensor:
        """What the heads add to the stream, (Hq, n, width)."""
        return self.parts.contributions(self.layer, positions.outputs.transpose(0, 1)[None])[0]

    def by_head(self, made: Tensor) -> Tensor:
        """Logits (Hq, n, vocabulary) of each head alone, of contributions (Hq, n, width)."""
        change = (made @ self.down.mT) @ self.up.mT
        return made @ self.unembedding.T + change + self.bias[:, None]

    def forward(self, made: Tensor) -> Tensor:
        """Their sum (n, vocabulary)."""
        low = (made @ self.down.mT).transpose(0, 1).flatten(1)
        up = self.up.transpose(1, 2).flatten(0, 1)
        return made.sum(0) @ self.unembedding.T + low @ up + self.bias.sum(0)

    def divergence(self, positions: Positions) -> Tensor:
        """Mean divergence () of what the lens says from what the model does, in nats."""
        with torch.no_grad():
            said = head_logits(self.parts.model, positions.hidden).log_softmax(-1)
        own = self(self.contributions(positions)).float().log_softmax(-1)
        return kl_div(own, said, reduction="batchmean", log_target=True)


@register(
    Card(
        name="attention_lens",
        title="Attention Lens: A Tool for Mechanistically Interpreting the Attention Head "
        "Information Retrieval Mechanism",
        year=2023,
        paper=205,
        claim="a linear map of each head, trained to predict what the model does, shows in words "
        "what the head says",
        kind="analysis",
        family="analysis",
        pretrained="exact",
        cost="a pass over the texts, then steps of `batch` positions; heads · vocabulary · rank "
        "weights",
        confidence="high; maps of full rank are not offered",
    )
)
@dataclass(frozen=True, kw_only=True)
class AttentionLens:
    """Trains the lens of a layer (negative: from the last) on the positions of texts.

    Adam of rate lr takes at most `steps` steps of `batch` positions. An eighth of the positions is
    held out: training ends when their loss no longer falls, and the best lens is kept.
    """

    layer: int = -1
    rank: int = 16
    lr: float = 1e-3
    steps: int = 200
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch"):
            ops.check_block(name, getattr(self, name))
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")

    def __call__(self, model: Any, inputs: Inputs) -> Lens:
        """The lens of a model by token ids (B, L) or a tokenizer's batch.

        Raises IndexError for a layer out of range, ValueError for fewer positions than a batch and
        those held out.
        """
        layers = Parts(model).layers
        if not -layers <= self.layer < layers:
            raise IndexError(f"layer must be in [{-layers}, {layers}), got {self.layer}")
        made = torch.Generator().manual_seed(self.seed)
        lens = Lens(model, self.layer, self.rank, made)
        positions = lens.collect(inputs)
        count = len(positions.hidden)
        # The last ones: neighbours of those trained on would flatter the lens.
        held = positions.at(torch.arange(count - count // _HELD, count))
        seen = positions.at(torch.arange(count - count // _HELD))
        if len(seen.hidden) < self.batch or not len(held.hidden):
            raise ValueError(f"attention_lens got {count} positions for batches of {self.batch}")
        self._train(lens, seen, held, made)
        return lens.eval()

    def _train(self, lens: Lens, seen: Positions, held: Positions, made: torch.Generator) -> None:
        optimizer = torch.optim.Adam(lens.parameters(), lr=self.lr)
        best, waited = copy.deepcopy(lens.state_dict()), 0
        with torch.no_grad():
            lens.losses.append(float(lens.divergence(held)))
        for step in range(1, self.steps + 1):
            which = torch.randperm(len(seen.hidden), generator=made)[: self.batch]
            with torch.enable_grad():
                loss = lens.divergence(seen.at(which))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            optimizer.step()
            if step % _EVERY and step < self.steps:
                continue
            with torch.no_grad():
                lens.losses.append(float(lens.divergence(held)))
            if lens.losses[-1] == min(lens.losses):
                best, waited = copy.deepcopy(lens.state_dict()), 0
            elif (waited := waited + 1) == _PATIENCE:
                break
        lens.load_state_dict(best)
