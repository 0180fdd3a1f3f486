"""Mechanisms of Factual Recall in Transformer-Based Language Models (2024, paper 264)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.analysis._prompts import Prompt, first_answers, padded
from foveate.analysis.base import Record, describe, stacked
from foveate.hf.frozen import before_norm
from foveate.hf.parts import Inputs, Parts, run
from foveate.hf.watch import Seen, watch
from foveate.registry import Card, nearest, register

TARGETS = ("answer", "top", "subject")
# The largest difference, relative to the stream, of a last stream rebuilt from its parts.
_REBUILT = 1e-3


def heads_in_mlp(mlp: Tensor, heads: Tensor, stream: Tensor) -> Tensor:
    """Weights (H + 1,) with which a feed-forward part repeats heads and, last, what entered.

    Least squares of its outputs (n, width) on what each head adds (n, H, width) and the stream
    before attention (n, width), one weight for all samples and coordinates: about 1 amplifies
    what a head says, about -1 erases it.
    """
    columns = torch.cat((heads, stream[:, None]), 1).transpose(0, 1).flatten(1).double()
    found: Tensor = torch.linalg.lstsq(columns.T, mlp.double().flatten()[:, None]).solution[:, 0]
    return found


@contextmanager
def scaled(model: Any, factor: float, part: str = "mlp", layer: int = -1) -> Iterator[None]:
    """Multiply what the "mlp" or the "attention" of a layer adds to the stream by a factor.

    Raises ValueError for another part, IndexError for a layer out of range.
    """
    if part not in ("mlp", "attention"):
        raise ValueError(f'part must be "mlp" or "attention", got {part!r}')
    parts = Parts(model)
    if not -parts.layers <= layer < parts.layers:
        raise IndexError(f"{parts.name} has {parts.layers} layers, no layer {layer}")

    def told(at: int, x: Tensor) -> Tensor | None:
        return factor * x if at == layer % parts.layers else None

    with watch(model, mlp_out=told) if part == "mlp" else watch(model, attention_out=told):
        yield


@register(
    Card(
        name="factual_recall",
        title="Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models",
        year=2024,
        paper=264,
        claim="heads bring the answer, feed-forward parts act on it, the last layer holds it back",
        kind="analysis",
        family="analysis",
        pretrained="exact",
        cost="a pass over the prompts",
        confidence="medium",
    )
)
@dataclass(frozen=True, kw_only=True)
class FactualRecall:
    """What each part adds to the logit of a token after the prompts, the final norm's scale fixed.

    target: the first token of the "answer", the "top" token of the model, or the last token of the
    "subject". `head` (layer, head), `attention` and `mlp` (layer), `start` (the embeddings) and
    `constant` (a norm's bias) sum to `logit`, attention being its heads and a bias; all are means
    over prompts. `head centred` and `mlp centred` are less what the mean token of the vocabulary
    gets: what is common to all changes no probability. `mlp negative` and `attention negative` are
    the shares of prompts in which a layer lowers the logit. `repeats` (layer, head) and `keeps`
    (layer) are the weights of `heads_in_mlp`.
    """

    target: str = "answer"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"unknown target {self.target!r}{nearest(self.target, TARGETS)}")

    @torch.no_grad()
    def __call__(self, model: Any, prompts: Sequence[Prompt]) -> Record:
        """Of a model on prompts; TypeError where its parts do not simply add to one stream."""
        inputs = padded(prompts)
        parts, last = Parts(model), _Last(model, inputs)
        rows = model.get_output_embeddings().weight
        token = self._token(prompts, last.hidden @ rows.T)
        norm = parts.final_norm()
        toward = before_norm(norm, last.stream, rows[token])
        mean = rows.mean(0).expand_as(toward)
        centred = toward - before_norm(norm, last.stream, mean)
        logit = (last.hidden * rows[token]).sum(-1)
        attention, mlp = torch.stack(last.attention, 1), torch.stack(last.mlp, 1)
        heads = [
            parts.contributions(layer, out[:, :, None])[:, :, 0]
            for layer, out in enumerate(last.heads)
        ]
        repeats = stacked(
            [heads_in_mlp(*x) for x in zip(last.mlp, heads, last.entering, strict=True)]
        )
        own = {"attention": _along(attention, toward), "mlp": _along(mlp, toward)}
        values = {
            "head": stacked([_along(x, toward).mean(0) for x in heads]),
            "head centred": stacked([_along(x, centred).mean(0) for x in heads]),
            "mlp centred": _along(mlp, centred).mean(0),
            "repeats": repeats[:, :-1],
            "keeps": repeats[:, -1],
        }
        for name, added in own.items():
            values[name] = added.mean(0)
            values[f"{name} negative"] = (added < 0).float().mean(0)
        start = _along(last.entering[0], toward).mean()
        sums = start + values["attention"].sum() + values["mlp"].sum()
        values |= {"start": start, "logit": logit.mean(), "constant": logit.mean() - sums}
        axes = {name: ("layer", "head")[: x.dim()] for name, x in values.items()}
        about = describe(model, inputs, **asdict(self))
        return Record("factual_recall", values, axes, "head", about)

    def _token(self, prompts: Sequence[Prompt], logits: Tensor) -> Tensor:
        if self.target == "top":
            return logits.argmax(-1)
        if self.target == "answer":
            return first_answers(prompts)
        return torch.stack([p.ids[0, p.spans["subject"][1] - 1] for p in prompts])


class _Last:
    """A run at its last position: streams that enter layers, and what the parts add."""

    def __init__(self, model: Any, inputs: Inputs) -> None:
        self.entering: list[Tensor] = []
        self.heads: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.mlp: list[Tensor] = []

        def keep(held: list[Tensor]) -> Any:
            return lambda layer, x: held.append(x[:, -1])

        def attention(seen: Seen) -> None:
            self.heads.append(seen.out[:, :, -1])

        places = {"block_in": self.entering, "attention_out": self.attention, "mlp_out": self.mlp}
        told = {name: keep(held) for name, held in places.items()}
        with watch(model, attention=attention, **told) as parts:
            self.hidden = run(model, inputs)[:, -1]
        self.stream = self.entering[0] + sum(self.attention) + sum(self.mlp)
        rebuilt = parts.final_norm()(self.stream)
        if float((rebuilt - self.hidden).norm() / self.hidden.norm()) > _REBUILT:
            raise TypeError(
                f"{parts.name}: its blocks do not simply add attention and feed-forward parts to "
                "the stream, so that no logit is the sum of what they add"
            )


def _along(added: Tensor, toward: Tensor) -> Tensor:
    """Of additions (B, …, width) what goes along directions (B, width): (B, …)."""
    return (added * toward.view(len(toward), *(1,) * (added.dim() - 2), -1)).sum(-1)
