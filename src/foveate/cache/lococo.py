"""Half of the slots hold heavy hitters, the other half mixtures that a convolution weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d

from foveate import ops
from foveate.attention._trained import Learner, ModelShape, Trainable
from foveate.attention.base import Call
from foveate.cache.base import Bounded, Packed, Slots, Tables
from foveate.registry import Card, register


@register(
    Card(
        name="lococo",
        title="LoCoCo: Dropping In Convolutions for Long Context Compression",
        claim="a short convolution learns to fold the tokens that are dropped into a cache of "
        "fixed size",
        kind="cache",
        family="decode",
        year=2024,
        paper=128,
        pretrained="fine-tune",
        cost="O(n·kernel·D·budget) per compression of n slots, O(budget·D) a token for scores",
        decoding="budget + buffer slots at most; scores are summed since the last compression",
        confidence="checked against the released code; scores while decoding are ours",
        small={"budget": 16, "buffer": 4},
        full={"budget": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class LoCoCo(Trainable, Bounded):
    """Whenever more than `buffer` slots lie over the budget, a row is brought back to it.

    The share `keep` of the budget goes to heavy hitters, the slots that the last chunk attended to
    most, its last `local` tokens among them. Every other slot is one of the next best, blended
    with a mixture of all that are no heavy hitters: the softmax, over these, of a convolution of
    `kernel` taps along their keys and values. `conv` names the file of a trained convolution;
    without it nothing is mixed. Feed a long prompt in chunks, of `chunk` tokens when training.
    """

    trained: ClassVar[str] = "conv"

    budget: int = 128
    buffer: int = 16
    keep_share: float = 0.5
    local: int = 0
    kernel: int = 21
    chunk: int = 128
    conv: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_block("chunk", self.chunk)
        if ops.check_block("kernel", self.kernel) % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"keep_share must be above 0 and at most 1, got {self.keep_share}")
        if not 0 <= self.local <= self.budget - self.mixed:
            raise ValueError(
                f"local must be at least 0 and at most the {self.budget - self.mixed} slots of "
                f"heavy hitters, got {self.local}"
            )
        if (found := self.read()) is not None:
            mine = {name: getattr(self, name) for name in ("budget", "keep_share", "kernel")}
            found.check_options(**mine)
            layers, wide = found.shape.layers, 2 * found.shape.dim
            found.check_tensors(
                "convolutions",
                weight=(layers, self.mixed, wide, self.kernel),
                bias=(layers, self.mixed),
                blend=(layers,),
            )

    @property
    def mixed(self) -> int:
        """Slots that are mixtures."""
        return int(self.budget * (1 - self.keep_share))

    @property
    def notes(self) -> tuple[str, ...]:
        """Attention received."""
        return ("score",)

    def due(self, held: float, *, prefill: bool) -> bool:
        """A prefill may fill the buffer too."""
        return super().due(held, prefill=False)

    def observe(self, q: Tensor, k: Tensor, notes: Packed, *, scale: float | None) -> Packed:
        """The attention of this chunk, or of the decoded tokens since the last compression."""
        new = ops.token_scores(q, k, over="sum", scale=scale)[0]
        return {"score": new if q.shape[2] > 1 else notes["score"] + new}

    def score(self, q: Tensor, k: Tensor, notes: Packed, *, scale: float | None) -> Tensor:
        """Attention received; the local tokens stay."""
        scores = notes["score"].clone()
        scores[:, k.shape[2] - self.local :] = torch.inf
        return scores

    def merge(
        self, row: Slots, scores: Tensor, kept: Tensor, *, rope: Tables | None, layer: int
    ) -> Slots:
        """The kept slots; those that are no heavy hitters blended with what is dropped."""
        row = row.replaced({"score": torch.zeros_like(row.flat("score"))})
        held, found = row.keep(kept), self.read()
        if found is None or not self.mixed:
            return held
        k, v = (row.padded(name) for name in "kv")
        found.check_model(found.shape._replace(kv_heads=k.shape[0], dim=k.shape[2]))
        part = {name: x[layer] for name, x in found.weights.items()}
        mixed = self.blended(k.float(), v.float(), scores, kept, part)
        flat = {n: x.flatten(0, 1).to(row.held[n].dtype) for n, x in zip("kv", mixed, strict=True)}
        return held.replaced(flat)

    def blended(
        self, k: Tensor, v: Tensor, scores: Tensor, kept: Tensor, part: Packed
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (Hkv, budget, D) of the kept slots of k, v (Hkv, n, D), mixtures mixed.

        part: the convolution of a layer, weight (mixed, 2·D, kernel) and bias (mixed,), and the
        share `blend` of its mixtures, clamped to [0, 1].
        """
        heads = k.shape[0]
        heavy = ops.top_k(scores, self.budget - self.mixed)
        rest = (~heavy).nonzero()[:, 1].view(heads, -1)
        both = torch.cat([k, v], 2)
        others = both.gather(1, rest[..., None].expand(-1, -1, both.shape[2]))
        reach = self.kernel // 2
        logits = conv1d(others.transpose(1, 2), part["weight"], part["bias"], padding=reach)
        share = part["blend"].clamp(0, 1)
        means = torch.softmax(logits.relu(), -1) @ others
        chosen = both[kept].view(heads, -1, both.shape[2])
        inside = (kept & ~heavy)[kept].view(heads, -1, 1)
        order = inside.long().cumsum(1).sub(1).clamp_min(0).expand_as(chosen)
        mixed = torch.where(inside, torch.lerp(chosen, means.gather(1, order), share), chosen)
        return mixed[..., : k.shape[2]], mixed[..., k.shape[2] :]

    def learner(self, shape: ModelShape) -> Learner:
        """Its convolutions before training."""
        return Convolutions(self, shape)


class Convolutions(Learner):
    """One convolution and blend for every layer, trained by the model's own loss.

    A layer goes through its text chunk by chunk, as the cache does; gradients reach a convolution
    through the attention of the chunk after it only.
    """

    through_model: ClassVar[bool] = True

    def __init__(self, policy: LoCoCo, shape: ModelShape) -> None:
        super().__init__()
        self.policy = policy
        size = (shape.layers, policy.mixed, 2 * shape.dim, policy.kernel)
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(size, generator=draw))
        self.bias = nn.Parameter(torch.zeros(size[:2]))
        self.blend = nn.Parameter(torch.full((shape.layers,), 0.5))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Each chunk attends to what the cache would hold, and to itself causally."""
        part = {name: x[call.layer] for name, x in self.named_parameters()}
        outs, keys, values = [], k[:, :, :0], v[:, :, :0]
        scores = keys.new_empty(k.shape[1], 0)
        for new_q, new_k, new_v in zip(
            *(x.split(self.policy.chunk, 2) for x in (q, k, v)), strict=True
        ):
            if self.policy.due(keys.shape[2], prefill=True):
                kept = self.policy.keep(scores)
                found = self.policy.blended(keys[0], values[0], scores, kept, part)
                keys, values = (x[None] for x in found)
            keys, values = torch.cat([keys, new_k], 2), torch.cat([values, new_v], 2)
            outs.append(ops.attend(new_q, keys, values, causal=True, scale=call.scale))
            keys, values = keys.detach(), values.detach()
            with torch.no_grad():
                note = {"score": keys.new_zeros(keys.shape[1:3])}
                note = self.policy.observe(new_q, keys, note, scale=call.scale)
                scores = self.policy.score(new_q, keys, note, scale=call.scale)
        return torch.cat(outs, 2)

    def loss(self, done: float, text: Tensor | None, task: int) -> Tensor:
        """The model's own."""
        if text is None:
            raise ValueError("the convolutions are trained through the model")
        return text
