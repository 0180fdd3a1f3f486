"""Multi-query attention (2019, paper 209): what a shared key and value head saves in decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch

from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import loaded, text_ids
from foveate.bench.runs import window_perplexity
from foveate.bench.timing import paired
from foveate.bench.train import train
from foveate.hf.convert import Conversion
from foveate.nn.decode.mqa import MQA

CLAIM = "the fewer key and value heads, the fewer bytes a step reads and the faster it is"

_HEADS, _WIDTH, _TOKENS, _BATCH = 8, 64, 4096, 8
# Windows to train on and to test on, and their tokens.
_WINDOWS, _HELD_OUT, _LENGTH = 16, 8, 256


def measure() -> Outcome:
    """A decoding step over 4,096 tokens of 8 sequences: 8, 2 and 1 kv heads for 8 query heads.

    Beside it the perplexity of the built-in model when its 3 kv heads are made into 1, before and
    after 16 steps of training on 256 tokens each.
    """
    figures: dict[str, float] = {}
    gains = []
    with torch.inference_mode():
        steps = {kv_heads: _step(kv_heads) for kv_heads in (_HEADS, 2, 1)}
        for kv_heads, (step, held) in steps.items():
            figures[f"cache MB, {kv_heads} kv heads"] = held / 1e6
            if kv_heads < _HEADS:
                gains.append(paired(steps[_HEADS][0], step, 11)[2])
                figures[f"times faster than full heads, {kv_heads} kv heads"] = gains[-1]
    return Outcome(figures | _quality(), 1 < gains[0] < gains[1])


def _step(kv_heads: int) -> tuple[Callable[[], object], int]:
    """Attention of one token to a cache, and the bytes of the cache."""
    made = torch.Generator().manual_seed(0)
    layer = MQA(_HEADS * _WIDTH, _HEADS, kv_heads)
    q = torch.randn(_BATCH, _HEADS, 1, _WIDTH, generator=made)
    k, v = torch.randn(2, _BATCH, kv_heads, _TOKENS, _WIDTH, generator=made)
    return lambda: layer.attend(q, k, v, True, None), k.nbytes + v.nbytes


def _quality() -> dict[str, float]:
    """Perplexity of held-out windows under the model's own heads and under a single one."""
    model, _ = loaded()
    count = _WINDOWS + _HELD_OUT
    ids = text_ids(count * _LENGTH).view(count, _LENGTH)
    seen, test = ids.split((_WINDOWS, _HELD_OUT))
    figures = {"perplexity, 3 kv heads": window_perplexity(model, test)}
    conversion = Conversion.of("mqa")
    taught = train(model, conversion, [seen], steps=_WINDOWS)
    with conversion.apply(model) as converted:
        figures["perplexity, their mean, untrained"] = window_perplexity(model, test)
        converted.layers.load_state_dict(taught.learner.state_dict())
        figures["perplexity, their mean, trained"] = window_perplexity(model, test)
    return figures
