"""One run of a model with mechanisms attached: prefill, then decoding, timed or recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.attention.base import Record
from foveate.bench.maps import CELLS, block_map
from foveate.hf.attach import attach
from foveate.hf.layers import Stateful, storage_bytes
from foveate.hf.parts import body, head_logits

# Rows of logits made at once: a whole prompt of logits over a large vocabulary fills the memory.
_ROWS = 256


@dataclass
class Recording:
    """Mean density and retained mass by phase, and the picture of one head of one layer."""

    layer: int
    head: int
    sums: dict[str, list[float]] = field(default_factory=dict)
    picture: list[list[float | None]] = field(default_factory=list)
    phase: str = ""

    def __call__(self, record: Record) -> None:
        """Take in what one call did."""
        for key, value in (("density", record.density), ("retained_mass", record.retained_mass)):
            entry = self.sums.setdefault(f"{key}.{record.phase}", [0.0, 0.0])
            entry[0] += value
            entry[1] += 1
        # One prefill call is a whole picture; decoding adds a row a step.
        phase = "prefill" if record.phase == "prefill" else "decode"
        room = not self.picture or (phase == "decode" and len(self.picture) < CELLS)
        if record.layer == self.layer and self.phase in ("", phase) and room:
            self.phase = phase
            self.picture += block_map(record.layout, self.head)

    def mean(self, key: str, phase: str) -> float | None:
        """Mean over calls, None when the phase was dense over a full cache.

        What decoding reads is a share of what the cache kept: the two multiply.
        """
        phases = (phase, "cache") if phase == "decode" else (phase,)
        found = [self.sums[f"{key}.{p}"] for p in phases if f"{key}.{p}" in self.sums]
        return math.prod(total / count for total, count in found) if found else None


@dataclass
class Run:
    """What a run gives: seconds, the prompt's last hidden states, logits of the decoded steps.

    kv_bytes: storage held at the end; peak_kv_bytes: at its largest moment (None: not recorded).
    """

    prefill_seconds: float
    decode_seconds: float
    hidden: Tensor
    logits: Tensor
    kv_bytes: int
    peak_kv_bytes: int | None


class WatchedCache(DynamicCache):
    """A cache that notes the most it held at once, with what it handed to attention."""

    peak = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Store new tokens, and count all storages while attention has what it reads."""
        given = super().update(*args, **kwargs)
        held = [x for layer in self.layers if isinstance(layer, Stateful) for x in layer.tensors()]
        self.peak = max(self.peak, storage_bytes([*held, *given]))
        return given


@torch.inference_mode()
def run(
    model: Any,
    slots: Mapping[str, str],
    prompt: Tensor,
    then: Tensor,
    record: Recording | None = None,
) -> Run:
    """Prefill `prompt` (1, T), then decode the tokens of `then` (1, S) one at a time.

    A run that is recorded also watches its cache, and its seconds mean little.
    """
    watched = None if record is None else WatchedCache(config=body(model).config)
    with attach(model, **slots) as attached:
        attached.record = record
        start = time.perf_counter()
        out = body(model)(prompt, past_key_values=watched, use_cache=True)
        head_logits(model, out.last_hidden_state[0, -1:])
        middle = time.perf_counter()
        cache, steps = out.past_key_values, []
        for step in range(then.shape[1]):
            token = then[:, step : step + 1]
            state = body(model)(token, past_key_values=cache, use_cache=True).last_hidden_state
            steps.append(head_logits(model, state[0]))
        end = time.perf_counter()
    held = sum(x.nbytes() for x in cache.layers if isinstance(x, Stateful))
    hidden, logits = out.last_hidden_state[0], torch.cat(steps)
    peak = None if watched is None else max(watched.peak, held)
    return Run(middle - start, end - middle, hidden, logits, held, peak)


@torch.inference_mode()
def answer(
    model: Any, slots: Mapping[str, str], prompt: Tensor, tokens: int, *, held_back: int = 0
) -> list[int]:
    """The greedy continuation of a prompt, `tokens` long.

    The last `held_back` tokens of the prompt come in a call of their own: a cache policy has done
    its work on the others before it sees them.
    """
    with attach(model, **slots):
        cache: Any = None
        said: list[int] = []
        parts = prompt.tensor_split([prompt.shape[1] - held_back], 1)
        coming = [part for part in parts if part.shape[1]]
        while len(said) < tokens:
            for part in coming:
                out = body(model)(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
            token = head_logits(model, out.last_hidden_state[0, -1:]).argmax(-1)
            said.append(int(token))
            coming = [token[None]]
    return said


@torch.inference_mode()
def perplexity(model: Any, hidden: Tensor, targets: Tensor) -> float:
    """exp of the mean loss of hidden states (n, width) whose next tokens are targets (n,)."""
    total = 0.0
    for lo in range(0, targets.numel(), _ROWS):
        logits = head_logits(model, hidden[lo : lo + _ROWS])
        rows = targets[lo : lo + _ROWS]
        total += float(torch.nn.functional.cross_entropy(logits, rows, reduction="sum").double())
    return float(torch.tensor(total / targets.numel()).exp())


@torch.no_grad()
def window_perplexity(model: Any, windows: Tensor) -> float:
    """Of the tokens of windows (windows, tokens), each read alone, but the first of each."""
    states = [body(model)(row[None, :-1], use_cache=False).last_hidden_state[0] for row in windows]
    return perplexity(model, torch.cat(states), windows[:, 1:].flatten())


@torch.inference_mode()
def divergence(dense: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean KL(dense ‖ other) in nats and top-1 agreement of logits (n, vocabulary)."""
    kl = 0.0
    for lo in range(0, dense.shape[0], _ROWS):
        p = torch.log_softmax(dense[lo : lo + _ROWS], -1)
        r = torch.log_softmax(other[lo : lo + _ROWS], -1)
        kl += float((p.exp() * (p - r)).sum().double())
    same = (dense.argmax(-1) == other.argmax(-1)).float().mean()
    return max(kl / dense.shape[0], 0.0), float(same)
