"""Mamba-2 (2024): what larger states hold, and what they cost."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate import create
from foveate.bench.claims import Outcome
from foveate.bench.timing import paired
from foveate.nn._recurrent import State
from foveate.nn.linear.mamba2 import StateSpaceDual

CLAIM = "eight times the state of Mamba takes no more time, and holds more pairs"

_PAIRS, _HEADS, _WIDTH = 64, 4, 16


def measure() -> Outcome:
    """Of 64 random pairs those read back right, by states of 16 to 128 numbers a channel.

    Time is that of 1,024 tokens of 256 channels, Mamba with 16 numbers over Mamba-2 with 128.
    """
    with torch.inference_mode():
        figures = {f"share held, {n} states": _held(n) for n in (16, 64, 128)}
        few, some, many = figures.values()
        x = torch.randn(2, 1024, 128, generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            mamba = create("s6", dim=128).eval()
            larger = create("mamba2", dim=128, heads=4).eval()
        _, _, faster = paired(lambda: mamba(x), lambda: larger(x), 7)
    figures["times faster than Mamba, states 8 times as large"] = faster
    return Outcome(figures, few < some < many and faster > 1)


def _held(states: int) -> float:
    """Share of values that the recurrence of the layer gives back for their keys, undecayed."""
    layer = create("mamba2", dim=32, heads=_HEADS, states=states)
    layer.convs.activation = False
    layer.convs.weight.zero_()[:, -1] = 1.0
    layer.log_a.fill_(-40.0)
    layer.step_bias.fill_(1.0)
    layer.skip.zero_()
    made = torch.Generator().manual_seed(0)
    values = torch.randn(8, _PAIRS, _HEADS * _WIDTH, generator=made)
    keys = torch.randn(8, _PAIRS, states, generator=made)
    start = State("mamba2", torch.zeros(8, dtype=torch.long))
    y = _read(layer, torch.cat((values, torch.zeros_like(values)), 1), keys, start)
    near = y.unflatten(-1, (_HEADS, _WIDTH)).transpose(1, 2)
    known = values.unflatten(-1, (_HEADS, _WIDTH)).transpose(1, 2)
    return float(((near @ known.mT).argmax(-1) == torch.arange(_PAIRS)).float().mean())


def _read(layer: StateSpaceDual, values: Tensor, keys: Tensor, start: State) -> Tensor:
    """Values written under their keys, then read: what comes out at the keys' second turn."""
    nothing = torch.zeros_like(keys)
    b, c = torch.cat((keys, nothing), 1), torch.cat((nothing, keys), 1)
    step = torch.zeros(*keys.shape[:1], 2 * _PAIRS, _HEADS)
    y, _, _ = layer.recurrence(torch.cat((values, b, c), -1), step, None, start)
    return y[:, _PAIRS:]
