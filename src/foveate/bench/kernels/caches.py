"""Decoding: one query against a long cache, exact, gathered and quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.bench.kernels.inputs import LARGE, SMALL, Heads, layers_of, random_qkv
from foveate.bench.kernels.race import Contender
from foveate.bench.kernels.rivals import SDPA
from foveate.bench.kernels.trial import COPY, Cast, Line, Rival, Trial
from foveate.ops import Quantized, attend, attend_quantized, gather, quantize

_EXACT, _SHARE, _PAGE = "fp32 decode", 8, 16
_BITS = {8: ("int8", 2.5), 4: ("int4", 4.0), 2: ("2-bit", 6.0)}
_GOAL_LENGTH = 32768


def decode_trials(sizes: tuple[int, ...], quick: bool) -> Iterator[Trial]:
    """One query over caches of float32, of codes, and over an eighth of the pages."""
    for heads in (SMALL, LARGE):
        for tokens in sizes or (1024, 8192, 32768, 65536):
            label = f"decode, {tokens:,} tokens, {heads}"
            cast = partial(_decode_cast, heads, tokens)
            yield Trial("decode", label, torch.get_num_threads(), cast)


def _decode_cast(heads: Heads, tokens: int) -> Cast:
    q, k, v = random_qkv(heads, tokens, queries=1)
    layers = layers_of((k, v))
    pages = max(1, tokens // _PAGE // _SHARE)
    scores = torch.rand(1, heads.kv, 1, max(1, tokens // _PAGE))
    idx = scores.topk(pages).indices.sort().values
    exact = k.nbytes + v.nbytes
    contenders = {
        _EXACT: _over(layers, lambda k, v: attend(q, k, v, causal=True)),
        SDPA: _over(layers, lambda k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True)),
        "pages": _over(layers, lambda k, v: gather(q, k, v, idx, width=_PAGE)),
    }
    at_goal = tokens == _GOAL_LENGTH
    flops = 4.0 * heads.dim * heads.q * tokens
    shape = heads.shape(tokens)
    goals = {COPY: 0.8} if at_goal else {}
    lines = [
        Line("fp32", _EXACT, shape, flops, exact, {SDPA: Rival(SDPA)}, goals),
        Line(
            f"fp32, 1/{_SHARE} gathered",
            "pages",
            shape | {"block": _PAGE, "density": 1 / _SHARE},
            flops * pages * _PAGE / tokens,
            exact * pages * _PAGE / tokens,
            {_EXACT: Rival(_EXACT)},
            ideal=float(_SHARE),
        ),
    ]
    for bits, (name, goal) in _BITS.items():
        codes = [quantize(x, bits, group=heads.dim) for x in (k, v)]
        parts = [*codes[0], *codes[1]]
        contenders[name] = _over(layers_of(parts), _quantized(q, bits))
        held = sum(x.nbytes for x in parts)
        rivals = {_EXACT: Rival(_EXACT)}
        goals = {_EXACT: goal} if at_goal else {}
        shape_of_codes = shape | {"bits": bits, "group": heads.dim}
        lines.append(
            Line(name, name, shape_of_codes, flops, held, rivals, goals, ideal=exact / held)
        )
    return Cast(contenders, lines)


def _over(layers: Sequence[tuple[Tensor, ...]], call: Callable[..., object]) -> Contender:
    """A call on the cache of every layer in turn."""

    def run() -> None:
        for parts in layers:
            call(*parts)

    return Contender(run, calls=len(layers))


def _quantized(q: Tensor, bits: int) -> Callable[..., object]:
    def call(*parts: Tensor) -> object:
        keys, values = Quantized(*parts[:3]), Quantized(*parts[3:])
        return attend_quantized(q, keys, values, k_bits=bits, v_bits=bits)

    return call
