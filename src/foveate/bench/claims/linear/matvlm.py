"""MaTVLM (2025, paper 309): what the projections of attention are worth to Mamba-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.runs import window_perplexity
from foveate.hf.parts import body
from foveate.nn._attention import Projections
from foveate.nn.linear.matvlm import MaTVLM, distillation_loss
from foveate.tasks.train import fit

CLAIM = "a Mamba-2 layer that starts from attention's projections learns to stand in for it sooner"

_LAYER, _LENGTH, _WINDOWS, _HELD_OUT, _STEPS = 4, 128, 16, 4, 160

_REMARK = "a norm that attention does not have makes what starts from its weights far too long"


class Placed(nn.Module):
    """A layer where a model calls its attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Tokens (B, L, dim) -> (B, L, dim)."""
        return self.layer(hidden_states), None


def measure() -> Outcome:
    """One layer of the built-in model distilled for 160 steps, from its own and from new weights.

    distance: to what attention gives, over the size of that, on text not trained on.
    """
    model, _ = loaded()
    count = _WINDOWS + _HELD_OUT
    ids = text_ids(count * _LENGTH).view(count, _LENGTH)
    block = model.model.layers[_LAYER]
    inputs, outputs = _seen(block.self_attn, ids)
    weights, heads = Projections.of(block.self_attn), model.config.num_attention_heads
    figures = {"perplexity, attention": window_perplexity(model, ids[_WINDOWS:])}
    for name in ("its weights", "new weights"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = MaTVLM.from_attention(weights, heads)
            if name == "new weights":
                layer.inner.reset_parameters()
                layer.out.reset_parameters()
        figures[f"distance untrained, {name}"] = _distance(layer, inputs, outputs)
        _distil(layer, inputs[:_WINDOWS], outputs[:_WINDOWS])
        figures[f"distance, {name}"] = _distance(layer, inputs, outputs)
        kept, block.self_attn = block.self_attn, Placed(layer)
        figures[f"perplexity, {name}"] = window_perplexity(model, ids[_WINDOWS:])
        block.self_attn = kept
    sooner = figures["distance, its weights"] < figures["distance, new weights"]
    better = figures["perplexity, its weights"] < figures["perplexity, new weights"]
    return Outcome(figures, sooner and better, _REMARK)


def _distil(layer: MaTVLM, inputs: Tensor, outputs: Tensor) -> None:
    """Train a layer on what attention gave; there are no logits to learn from."""
    none = torch.zeros(1, 1)

    def loss(step: int) -> Tensor:
        at = step % len(inputs)
        return distillation_loss([(layer(inputs[at : at + 1]), outputs[at : at + 1])], none, none)

    fit(layer.parameters(), loss, steps=_STEPS, lr=1e-3)


@torch.no_grad()
def _distance(layer: MaTVLM, inputs: Tensor, outputs: Tensor) -> float:
    """Distance on the windows held out."""
    want = outputs[_WINDOWS:]
    return float((layer(inputs[_WINDOWS:]) - want).norm() / want.norm())


@torch.no_grad()
def _seen(attention: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a layer's attention and what comes out, (windows, L, dim) each."""
    model, _ = loaded()
    pairs: list[tuple[Tensor, Tensor]] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        pairs.append((kwargs["hidden_states"], out[0]))

    hook = attention.register_forward_hook(note, with_kwargs=True)
    for row in ids:
        body(model)(row[None], use_cache=False)
    hook.remove()
    inputs, outputs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return inputs, outputs
