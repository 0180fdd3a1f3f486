"""The benches by name; each gives its trials for the lengths asked for, or for its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from foveate.bench.kernels.caches import decode_trials
from foveate.bench.kernels.inputs import (
    LARGE,
    SMALL,
    Heads,
    random_layout,
    random_qkv,
    read_and_written,
)
from foveate.bench.kernels.race import Contender
from foveate.bench.kernels.recurrences import scan_trials
from foveate.bench.kernels.rivals import (
    FLEX,
    SDPA,
    TORCH,
    flex_lists,
    flex_window,
    no_flex,
    on_torch,
    sdpa,
    too_long,
)
from foveate.bench.kernels.trial import GEMM, Cast, Line, Rival, Trial
from foveate.ops import BlockLayout, attend, block_sparse, causal, from_mask, window

_WINDOW, _LISTED = 256, 64
_BLOCKS, _MORE_BLOCKS = (64, 128), (16, 256)
_DENSITIES = (0.05, 0.125, 0.25, 0.5)
_LISTS = "its block list"


def _causal_flops(heads: Heads, tokens: int) -> float:
    return 4.0 * heads.dim * heads.q * tokens * (tokens + 1) / 2


def _attend(sizes: tuple[int, ...], quick: bool) -> Iterator[Trial]:
    """Dense causal attention with its lse."""
    threads = torch.get_num_threads()
    for heads in (SMALL, LARGE):
        # The larger shape has seven times the work.
        for tokens in sizes or ((1024, 4096, 8192, 16384) if heads is SMALL else (1024, 4096)):
            label = f"attend, {tokens:,} tokens, {heads}"
            yield Trial("attend", label, threads, partial(_attend_cast, heads, tokens))


def _attend_cast(heads: Heads, tokens: int) -> Cast:
    q, k, v = inputs = random_qkv(heads, tokens)
    contenders = {"own": Contender(lambda: attend(q, k, v, causal=True, return_lse=True))}
    why = too_long(tokens)
    if not why:
        contenders[SDPA] = sdpa(inputs)
    line = Line(
        "dense, causal, with lse",
        "own",
        heads.shape(tokens),
        _causal_flops(heads, tokens),
        read_and_written(*inputs),
        {SDPA: Rival(SDPA)},
        {SDPA: 1.5, GEMM: 0.6} if 4096 <= tokens <= 16384 else {},
    )
    return Cast(contenders, [line], {SDPA: why})


def _window(sizes: tuple[int, ...], quick: bool) -> Iterator[Trial]:
    """A causal window of 256 tokens, on one thread and on all."""
    for threads in sorted({1, torch.get_num_threads()}):
        for tokens in sizes or (8192, 32768, 65536):
            label = f"window, {tokens:,} tokens, threads {threads}"
            cast = partial(_window_cast, tokens, threads, quick)
            yield Trial("window", label, threads, cast)


def _window_cast(tokens: int, threads: int, quick: bool) -> Cast:
    q, k, v = inputs = random_qkv(SMALL, tokens)
    rule = window(_WINDOW)
    layout = from_mask(rule & causal(), tokens, tokens, _LISTED)
    contenders = {
        "own": Contender(lambda: attend(q, k, v, mask=rule, causal=True)),
        _LISTS: Contender(lambda: block_sparse(q, k, v, layout, mask=rule, causal=True)),
    }
    skipped = {SDPA: too_long(tokens), FLEX: no_flex(tokens, quick)}
    if not skipped[SDPA]:
        contenders[SDPA] = sdpa(inputs)
    if not skipped[FLEX]:
        contenders[FLEX] = flex_window(inputs, _WINDOW)
    width = min(_WINDOW, tokens)
    pairs = width * (width + 1) / 2 + (tokens - width) * width
    line = Line(
        f"window of {_WINDOW}",
        "own",
        SMALL.shape(tokens),
        4.0 * SMALL.dim * SMALL.q * pairs,
        read_and_written(*inputs),
        {SDPA: Rival(SDPA), FLEX: Rival(FLEX), _LISTS: Rival(_LISTS)},
        {SDPA: 5.0, FLEX: 2.0} if (tokens, threads) == (8192, 1) else {},
        (tokens + 1) * tokens / 2 / pairs,
    )
    return Cast(contenders, [line], skipped)


def _block_sparse(sizes: tuple[int, ...], quick: bool) -> Iterator[Trial]:
    """Lists of key blocks of several sizes and densities, one list a query head."""
    for index, tokens in enumerate(sizes or (8192, 32768)):
        for block in sorted((*_BLOCKS, *_MORE_BLOCKS) if index == 0 else _BLOCKS):
            label = f"block_sparse, {tokens:,} tokens, blocks of {block}"
            cast = partial(_lists_cast, tokens, block, quick)
            yield Trial("block_sparse", label, torch.get_num_threads(), cast)


def _lists_cast(tokens: int, block: int, quick: bool) -> Cast:
    q, k, v = inputs = random_qkv(SMALL, tokens)
    layouts = {d: random_layout(SMALL, tokens, block, d) for d in _DENSITIES}

    def run(layout: BlockLayout) -> Callable[[], object]:
        return lambda: block_sparse(q, k, v, layout)

    contenders = {f"own {d}": Contender(run(layout)) for d, layout in layouts.items()}
    why, no_flex_here = too_long(tokens), no_flex(tokens, quick)
    if block not in _BLOCKS:
        no_flex_here = no_flex_here or f"compiled for blocks of {_BLOCKS[0]} and {_BLOCKS[1]} only"
    if not why:
        contenders[SDPA] = sdpa(inputs)
        contenders |= {f"{TORCH} {d}": on_torch(run(x)) for d, x in layouts.items()}
    if not no_flex_here:
        made = flex_lists(inputs, list(layouts.values()))
        contenders |= {f"{FLEX} {d}": one for d, one in zip(layouts, made, strict=True)}
    skipped = {SDPA: why}
    lines = []
    for d, layout in layouts.items():
        density = layout.density()
        rivals = {TORCH: f"{TORCH} {d}", FLEX: f"{FLEX} {d}"}
        skipped |= {rivals[TORCH]: why, rivals[FLEX]: no_flex_here}
        goals = {}
        if block in _BLOCKS and tokens in (8192, 32768):
            goals = {GEMM: 0.55} | ({} if why else {SDPA: 1.3 / density})
        lines.append(
            Line(
                f"blocks of {block}, {100 * d:g} % of them",
                f"own {d}",
                SMALL.shape(tokens, block=block, density=density),
                density * _causal_flops(SMALL, tokens),
                read_and_written(*inputs),
                {SDPA: Rival(SDPA), **{name: Rival(key) for name, key in rivals.items()}},
                goals,
                1 / density,
            )
        )
    return Cast(contenders, lines, skipped)


BENCHES: dict[str, Callable[[tuple[int, ...], bool], Iterator[Trial]]] = {
    "attend": _attend,
    "window": _window,
    "block_sparse": _block_sparse,
    "decode": decode_trials,
    "scan": scan_trials,
}
"""Trials by bench: (lengths, or none for the bench's own; quick: leave out what takes minutes)."""
