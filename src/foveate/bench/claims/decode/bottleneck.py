"""The New LLM Bottleneck (2025, paper 220): operations per byte of decoding, counted."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate import ops
from foveate.analysis.bottleneck import Bottleneck, latent
from foveate.bench.claims import Outcome

CLAIM = "latent attention does more than 100 times the work of multi-head attention per byte read"

# Heads and sizes of a large model with latent attention.
_HEADS, _DIM, _RANK, _ROPE, _TOKENS = 128, 128, 512, 64, 256


def measure() -> Outcome:
    """Operations per byte of a step over 256 tokens, by formula and counted in plain attention."""
    figures: dict[str, float] = {}
    matches = True
    for name, kv_heads in (("multi-head", _HEADS), ("16 kv heads", 16), ("multi-query", 1)):
        shape = Bottleneck(heads=_HEADS, kv_heads=kv_heads, dim=_DIM, tokens=_TOKENS)
        figures[name] = shape().intensity
        matches = matches and _grouped(kv_heads) == figures[name]
    figures["latent"] = latent(_HEADS, _RANK, _ROPE, _TOKENS).intensity
    matches = matches and _latent() == figures["latent"]
    return Outcome(figures, matches and figures["latent"] > 100 * figures["multi-head"])


def _grouped(kv_heads: int) -> float:
    """Counted in attention of one query over keys and values of 2 bytes a number."""
    q = torch.zeros(1, _HEADS, 1, _DIM, dtype=torch.bfloat16)
    k, v = torch.zeros(2, 1, kv_heads, _TOKENS, _DIM, dtype=torch.bfloat16)
    with ops.backend("reference"):
        return _counted(lambda: ops.attend(q, k, v), k, v)


def _latent() -> float:
    """Counted in absorbed attention over latents of 2 bytes a number."""
    q = torch.zeros(_HEADS, _RANK + _ROPE, dtype=torch.bfloat16)
    cache = torch.zeros(_TOKENS, _RANK + _ROPE, dtype=torch.bfloat16)
    return _counted(lambda: torch.softmax(q @ cache.T, -1) @ cache[:, :_RANK], cache)


def _counted(call: Callable[[], object], *cache: Tensor) -> float:
    """Operations of a call per byte of cache."""
    with FlopCounterMode(display=False) as meter:
        call()
    return meter.get_total_flops() / sum(x.nbytes for x in cache)
