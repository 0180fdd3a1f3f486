"""How Does Attention Work in Vision Transformers? A Visual Analytics Attempt (2023, paper 236)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from foveate import ops
from foveate.analysis.base import Head, Record, describe, stacked
from foveate.hf.ablate import ablate
from foveate.hf.parts import Inputs, Parts, head_logits, real_tokens, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, register

# Rows of a map whose distances are counted at once.
_CHUNK = 64


class Answers(NamedTuple):
    """What a model says: logits (n, classes), the states (n, width) they are read from, truth."""

    logits: Tensor
    states: Tensor
    truth: Tensor


def effects(plain: Answers, moved: Answers) -> dict[str, Tensor]:
    """How far answers moved: `loss`, `probability`, `accuracy`, `divergence`, `embedding`.

    Losses count up, probability of the truth and accuracy down, so that all are large for a head
    that matters; divergence is Jensen-Shannon's in nats, embedding 1 - cosine. Means over answers.
    """
    p, q = plain.logits.softmax(-1), moved.logits.softmax(-1)
    true = plain.truth[:, None]
    right = [(x.logits.argmax(-1) == plain.truth).float().mean() for x in (plain, moved)]
    return {
        "loss": cross_entropy(moved.logits, plain.truth) - cross_entropy(plain.logits, plain.truth),
        "probability": (p - q).gather(1, true).mean(),
        "accuracy": right[0] - right[1],
        "divergence": jensen_shannon(p, q).mean(),
        "embedding": 1 - cosine_similarity(plain.states, moved.states, -1).mean(),
    }


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Divergence (…) in nats, 0 to log 2, of distributions (…, classes)."""
    middle = (p + q) / 2
    sides = [torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q)]
    return ((sides[0] + sides[1]).sum(-1) / 2).clamp_min(0)


def hop_distance(tokens: int, grid: tuple[int, ...] = ()) -> Tensor:
    """Chebyshev distance (L, L) of tokens, in steps on a grid (height, width) or in a line.

    Tokens before the grid, as a class token, are farther than any patch. ValueError for a grid of
    more patches than there are tokens.
    """
    height, width = grid or (1, tokens)
    before = tokens - height * width
    if before < 0:
        raise ValueError(f"a grid of {height} × {width} has more patches than {tokens} tokens")
    at = torch.arange(height * width)
    place = torch.stack((at // width, at % width), -1)
    apart = (place[:, None] - place).abs().amax(-1)
    return torch.nn.functional.pad(apart, (before, 0, before, 0), value=tokens)


def hop_mass(p: Tensor, distance: Tensor, hops: int) -> Tensor:
    """Mass (…, n, hops + 1) of weights p (…, n, L) at each distance (n, L); the last: farther."""
    out = p.new_zeros(*p.shape[:-1], hops + 1)
    return out.scatter_add(-1, distance.clamp_max(hops).expand(p.shape), p)


@register(
    Card(
        name="vit_importance",
        title="How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
        year=2023,
        paper=236,
        claim="few heads of a layer matter to what the model says",
        kind="analysis",
        family="analysis",
        patterns=("noncausal self", "causal self"),
        pretrained="exact",
        cost="a pass for every head, one with gradients, and the rows of every map",
        confidence="medium; the paper's catalogue of patterns by autoencoder is not here",
    )
)
@dataclass(frozen=True, kw_only=True)
class VitImportance:
    """What heads are worth, by what the model says without them, and how far they look.

    By head: the `effects` of a zero in its place, and `proxy`, the slope of the loss in a factor
    on its output, from one backward pass for all. `hops` (layer, head, hop) is the mass at 0 …
    `hops` - 1 steps and, last, beyond or on tokens that are no patch, on a `grid` (height, width)
    of the last tokens or, without one, in a line.
    """

    hops: int = 8
    grid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ops.check_block("hops", self.hops)
        if len(self.grid) not in (0, 2) or any(side < 1 for side in self.grid):
            raise ValueError(f"grid must be a height and a width of at least 1, got {self.grid}")

    def __call__(
        self,
        model: Any,
        inputs: Inputs,
        labels: Tensor | None = None,
        heads: Iterable[Head] | None = None,
    ) -> Record:
        """Of an image classifier on its batch with labels (B,), or of a language model on a text.

        Without labels the truth is the next token. `heads`: those to ablate, all others NaN.
        """
        parts = Parts(model)
        shape = parts.layers, parts.heads
        every = [(i, h) for i in range(parts.layers) for h in range(parts.heads)]
        values: dict[str, Tensor] = {}
        with torch.no_grad():
            plain = answers(model, inputs, labels)
            for layer, head in every if heads is None else parts.check_heads(heads):
                with ablate(model, [(layer, head)]):
                    moved = answers(model, inputs, labels)
                for name, value in effects(plain, moved).items():
                    column = values.setdefault(name, torch.full(shape, float("nan")))
                    column[layer, head] = value
        values["proxy"] = slopes(model, inputs, labels)
        values["hops"] = self._profile(model, inputs)
        axes = {name: ("layer", "head", "hop")[: x.dim()] for name, x in values.items()}
        about = describe(model, inputs, **asdict(self))
        return Record("vit_importance", values, axes, "loss", about)

    @torch.no_grad()
    def _profile(self, model: Any, inputs: Inputs) -> Tensor:
        """Mean mass by distance (layer, head, hop) over real tokens, on a grid over patches."""
        found: list[Tensor] = []

        def attention(seen: Seen) -> None:
            tokens = seen.k.shape[2]
            distance = hop_distance(tokens, self.grid).to(seen.q.device)
            before = tokens - self.grid[0] * self.grid[1] if self.grid else 0
            rows = torch.arange(before, tokens, device=seen.q.device)
            total = seen.q.new_zeros(seen.q.shape[1], self.hops + 1)
            for some in rows.split(_CHUNK):
                mass = hop_mass(seen.rows(some), distance[some], self.hops)
                total += torch.einsum("bhnk,bn->hk", mass, seen.real_rows[:, some].to(mass))
            found.append(total / seen.real_rows[:, rows].sum())

        with watch(model, attention=attention):
            run(model, inputs)
        return stacked(found)


def answers(model: Any, inputs: Inputs, labels: Tensor | None) -> Answers:
    """What a model says of images, or after every token of a text but the last."""
    if labels is not None:
        states: list[Tensor] = []
        norm = Parts(model).final_norm()
        hook = norm.register_forward_hook(lambda _, args, out: states.append(out[:, 0]))
        try:
            given = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
            logits = model(**given).logits
        finally:
            hook.remove()
        return Answers(logits.float(), states[0], labels)
    ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
    real = real_tokens(inputs)
    follows = real[:, :-1] & real[:, 1:]
    said = run(model, inputs)[:, :-1][follows]
    return Answers(head_logits(model, said), said, ids[:, 1:][follows])


def slopes(model: Any, inputs: Inputs, labels: Tensor | None = None) -> Tensor:
    """Size of the loss's slope in a factor on the output of every head, (layers, heads), at 1."""
    parts = Parts(model)
    factor = torch.ones(parts.layers, parts.heads, requires_grad=True)

    def attention(seen: Seen) -> Tensor:
        return seen.out * factor[seen.layer][:, None, None].to(seen.out)

    with torch.enable_grad(), watch(model, attention=attention):
        said = answers(model, inputs, labels)
        loss = cross_entropy(said.logits, said.truth)
    (slope,) = torch.autograd.grad(loss, factor)
    return slope.abs()
