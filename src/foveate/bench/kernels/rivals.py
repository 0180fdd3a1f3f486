"""What the kernels are measured against."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate import ops
from foveate.bench.kernels.inputs import Inputs
from foveate.bench.kernels.race import Contender

SDPA, FLEX, TORCH = "dense SDPA", "compiled FlexAttention", "gather + SDPA"
# The longest sequences on which rivals are measured, and on which FlexAttention is compiled.
LONGEST, LONGEST_COMPILED = 16384, 8192


def sdpa(inputs: Inputs) -> Contender:
    """PyTorch's dense causal attention."""
    q, k, v = inputs
    return Contender(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def on_torch(call: Callable[[], Any]) -> Contender:
    """The same call on the torch backend."""

    def run() -> None:
        with ops.backend("torch"):
            call()

    return Contender(run)


def too_long(tokens: int) -> str:
    """Why a rival is not measured at this length; empty if it is."""
    return f"measured up to {LONGEST:,} tokens" if tokens > LONGEST else ""


def no_flex(tokens: int, quick: bool) -> str:
    """Why FlexAttention is not compiled; empty if it is."""
    if quick:
        return "not compiled in a quick run"
    if tokens > LONGEST_COMPILED:
        return f"compiled up to {LONGEST_COMPILED:,} tokens"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    return "" if any(map(shutil.which, filter(None, compilers))) else "there is no C++ compiler"


def _causal(b: Tensor, h: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    return q_pos >= k_pos


def flex_window(inputs: Inputs, size: int) -> Contender:
    """Compiled FlexAttention over the last `size` tokens of every query."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return (q_pos >= k_pos) & (q_pos - k_pos < size)

    tokens = inputs[0].shape[2]
    return _compiled(inputs, [create_block_mask(seen, None, None, tokens, tokens, "cpu")])[0]


def flex_lists(inputs: Inputs, layouts: list[ops.BlockLayout]) -> list[Contender]:
    """Compiled FlexAttention over block lists; it looks into blocks on the diagonal only."""
    from torch.nn.attention.flex_attention import BlockMask

    masks = []
    for layout in layouts:
        chosen = layout.to_bool()
        edge = torch.eye(*layout.grid, dtype=torch.bool)
        partial, full = _listed(chosen & edge), _listed(chosen & ~edge)
        masks.append(
            BlockMask.from_kv_blocks(
                partial[0],
                partial[1],
                full[0],
                full[1],
                BLOCK_SIZE=layout.block,
                mask_mod=_causal,
                seq_lengths=layout.lengths,
            )
        )
    return _compiled(inputs, masks)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks a row of a map has, and its blocks with those first."""
    order = chosen.byte().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int()


def _compiled(inputs: Inputs, masks: list[Any]) -> list[Contender]:
    """One compiled function for all masks; its compilation is charged to the first."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    call = torch.compile(flex_attention, dynamic=False)
    q, k, v = inputs

    def runs(mask: Any) -> Callable[[], Any]:
        return lambda: call(q, k, v, block_mask=mask, enable_gqa=True)

    return [Contender(runs(mask), compiles=True) for mask in masks]
