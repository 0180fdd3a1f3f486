"""LongGen: some layers see everything, the others a part of the context (2024, paper 277)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from foveate import ops
from foveate.attention.base import Call, Pattern, Result, dense_result
from foveate.attention.sparse._strided import causal_strides, head_offsets
from foveate.ops import Mask
from foveate.registry import Card, register


@register(
    Card(
        name="longgen",
        title="A Little Goes a Long Way: Efficient Long Context Training and Inference with "
        "Partial Contexts",
        year=2024,
        paper=277,
        claim="full attention in a third of the layers is enough to use a long context",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="fine-tune",
        cost="dense attention in a third of the layers, O(L·(window + sinks)·D) or O(L²/stride·D) "
        "in the others",
        decoding="the same pattern per layer over the full cache; a layer that is not full needs "
        "only its window and sinks, or the strided blocks",
        confidence="medium: which layers are full, the window and the stride are not published "
        "in detail",
        small={"window": 12, "sinks": 4, "block": 4, "full_layers": (0, 1)},
        full={"window": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class LongGen(Pattern):
    """Full layers are dense; the others read sinks and a window, or strided blocks.

    `full_layers` None is the middle third of the layers, rounded up; negative numbers count from
    the last. With `sparse` window a query reads the first `sinks` tokens and the `window` tokens
    up to itself; with strides kv head h reads the newest `local_blocks` blocks of `block` tokens
    and every `stride`-th before them, shifted by h.
    """

    full_layers: tuple[int, ...] | None = None
    sparse: Literal["window", "strides"] = "window"
    window: int = 1024
    sinks: int = 64
    stride: int = 8
    local_blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "stride", "local_blocks"):
            ops.check_block(name, getattr(self, name))
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if self.sparse not in ("window", "strides"):
            raise ValueError(f"sparse must be window or strides, got {self.sparse!r}")

    def full(self, layers: int) -> set[int]:
        """The layers, of `layers`, that see everything."""
        if self.full_layers is not None:
            return {layer % layers for layer in self.full_layers}
        count = -(-layers // 3)
        first = (layers - count) // 2
        return set(range(first, first + count))

    def mask(self, q_len: int, k_len: int, call: Call) -> Mask:
        """Sinks or window."""
        near = ops.window(self.window)
        return near | ops.sinks(self.sinks) if self.sinks else near

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Dense attention in a full layer, the part that other layers see elsewhere."""
        if call.layer in self.full(call.layers):
            return dense_result(q, k, v, call)
        if self.sparse == "window":
            return super().compute(q, k, v, call)
        offsets = head_offsets(q.shape[1], k.shape[1], self.stride, None)
        size = ((q.shape[2], k.shape[2]), self.block, self.stride, self.local_blocks)
        layout = causal_strides(*size, offsets)
        out, lse = ops.block_sparse(q, k, v, layout, return_lse=True, **call.options())
        return Result(out, lse, layout)
