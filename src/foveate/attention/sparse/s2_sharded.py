"""S2-Attention: Hardware-Aware Context Sharding Among Attention Heads (2024, paper 228)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from foveate import ops
from foveate.attention.base import BlockSparse, Call
from foveate.attention.sparse._strided import block_numbers, causal_strides, head_offsets
from foveate.ops import BlockLayout
from foveate.registry import Card, register


@register(
    Card(
        name="s2_sharded",
        title="S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
        year=2024,
        paper=228,
        claim="heads that read different shards of the context cover it together, at a fraction "
        "of the cost",
        kind="attention",
        family="sparse",
        patterns=("causal self", "noncausal self"),
        pretrained="fine-tune",
        cost="O(L²/stride·D + L·local_blocks·block·D) time, O(L·D) memory",
        decoding="the same blocks for each new token; what leaves a head's sight never returns",
        confidence="high on the pattern (released kernels), medium on which layers stay dense",
        small={"block": 8, "local_blocks": 2, "stride": 4},
        full={"stride": 1},
        exempt={"grouped heads": "kv heads read different blocks: repeated ones are others"},
    )
)
@dataclass(frozen=True, kw_only=True)
class S2Sharded(BlockSparse):
    """The newest `local_blocks` blocks, the own one among them, and every `stride`-th other.

    kv head h reads block J when (J + h * head_step + offset) % stride == 0; its query heads share
    its blocks. `head_step` None is stride / query heads, at least 1. The last `dense_heads` kv
    heads read everything. Without causality the strides count from the window's edges, before
    and behind, and are the same for all heads.
    """

    block: int = 64
    local_blocks: int = 16
    stride: int = 8
    head_step: int | None = None
    offset: int = 0
    dense_heads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("local_blocks", "stride"):
            ops.check_block(name, getattr(self, name))
        for name, value in (("head_step", self.head_step or 0), ("dense_heads", self.dense_heads)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")

    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout | None:
        """The pattern's blocks, one list per kv head."""
        kv_heads, lengths = k.shape[1], (q.shape[2], k.shape[2])
        if self.dense_heads > kv_heads:
            raise ValueError(
                f"dense_heads must be at most the {kv_heads} kv heads, got {self.dense_heads}"
            )
        if self.stride == 1 or self.dense_heads == kv_heads:
            return None
        offsets = head_offsets(q.shape[1], kv_heads, self.stride, self.head_step)
        offsets = tuple(x + self.offset for x in offsets)
        size = (lengths, self.block, self.stride, self.local_blocks)
        if call.causal:
            return causal_strides(*size, offsets, self.dense_heads)
        return _relative_strides(*size, kv_heads, self.dense_heads)


@lru_cache(maxsize=64)
def _relative_strides(
    lengths: tuple[int, int], block: int, stride: int, local: int, kv_heads: int, dense_heads: int
) -> BlockLayout:
    """Blocks whose distance to the window, in blocks, is a multiple of the stride; 0 inside it."""
    rows, cols = block_numbers(lengths, block)
    beyond = ((rows - cols).abs() - local + 1).clamp_min(0)
    chosen = (beyond % stride == 0).repeat(1, kv_heads, 1, 1)
    chosen[:, kv_heads - dense_heads :] = True
    return ops.from_map(chosen, block, lengths)
