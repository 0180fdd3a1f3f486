"""FAST (2024, paper 215): where a polynomial of q·k is fast, and where it is near softmax."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from foveate import ops
from foveate.bench.claims import Outcome
from foveate.bench.timing import paired
from foveate.nn.linear.fastmax import Fastmax

CLAIM = "a polynomial for the exponential takes linear time, and is softmax where scores are small"

_HEADS, _WIDTH = 4, 16


@torch.inference_mode()
def measure() -> Outcome:
    """Four heads of 16 channels at 1,024, 4,096 and 16,384 tokens against dense causal attention.

    Beside it the share of softmax's weight that moves to other keys as the temperature grows.
    """
    figures: dict[str, float] = {}
    for length in (1024, 4096, 16_384):
        q, k, v = _heads(length)
        figures[f"times faster than dense, {length} tokens"] = paired(
            partial(ops.attend, q, k, v, causal=True), partial(_fast, q, k, v), 3
        )[2]
    moved = [_moved(temperature) for temperature in (1.0, 2.0, 4.0)]
    for temperature, share in zip((1, 2, 4), moved, strict=True):
        figures[f"weight moved, temperature {temperature}"] = share
    near, middle, far = list(figures.values())[:3]
    return Outcome(figures, near < middle < far and far > 1 and moved[0] > moved[1] > moved[2])


def _heads(length: int) -> Tensor:
    made = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, _HEADS, length, _WIDTH, generator=made)


def _layer(temperature: float = 1.0) -> Fastmax:
    return Fastmax(_HEADS * _WIDTH, _HEADS, temperature=temperature)


def _fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, _ = ops.linear_attention_causal(*_layer().features(q, k), v)
    return out


def _moved(temperature: float) -> float:
    """Half the summed distance between the weights and those of softmax, mean over rows."""
    q, k, _ = _heads(256)
    fq, fk = _layer(temperature).features(q, k)
    hidden = torch.ones(256, 256).triu(1).bool()
    poly = (fq @ fk.mT).masked_fill(hidden, 0.0)
    q, k = (torch.nn.functional.layer_norm(x, (_WIDTH,)) for x in (q, k))
    scores = q @ k.mT / (temperature * _WIDTH**0.5)
    soft = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return float((poly / poly.sum(-1, keepdim=True) - soft).abs().sum(-1).mean() / 2)
