"""Linear attention (2020): time and memory against length."""

from __future__ import annotations

from collections.abc import Callable

import torch

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import pairs_and_questions, recalled_at_once
from foveate.bench.timing import paired
from foveate.nn._recurrent import state_bytes
from foveate.registry import create

CLAIM = (
    "without the exponential time grows with length and not with its square, at a loss of recall"
)

_DIM, _HEADS = 128, 2
_SHORT, _LONG = 2048, 8192


def measure() -> Outcome:
    """A layer of 128 channels at 2,048 and 8,192 tokens, the same of softmax, and recall."""
    figures: dict[str, float] = {}
    slopes = {}
    with torch.inference_mode():
        for name in ("linattn", "softmax_attention"):
            # Long over short: 4 is linear, 16 is quadratic.
            slopes[name] = paired(_run(name, _LONG), _run(name, _SHORT), 5)[2]
            figures[f"times longer for 4 times the tokens, {name}"] = slopes[name]
        _, state = _layer("linattn")(torch.zeros(1, _LONG, _DIM), return_state=True)
        figures["state KB after 8,192 tokens"] = state_bytes(state) / 1e3
    figures |= recalled_at_once(
        {"linattn": "linattn", "softmax": "dense"}, pairs_and_questions(16, 128), vocabulary=128
    )
    # 8 is half-way, by ratio, between what is linear and what is quadratic.
    linear = slopes["linattn"] < 8 < slopes["softmax_attention"]
    return Outcome(figures, linear and figures["accuracy, softmax"] > figures["accuracy, linattn"])


def _layer(name: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer: torch.nn.Module = create(name, dim=_DIM, heads=_HEADS)
    return layer


def _run(name: str, length: int) -> Callable[[], object]:
    layer = _layer(name)
    x = torch.randn(1, length, _DIM, generator=torch.Generator().manual_seed(0))
    return lambda: layer(x)
