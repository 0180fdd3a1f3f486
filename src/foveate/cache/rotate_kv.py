"""Keys rotated across heads and sorted by channel, so that two to four bits hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate import ops
from foveate.cache.base import Codec, Packed
from foveate.ops.quantize import BITS
from foveate.registry import Card, register

_PARTS = ("", "_scale", "_zero")


@register(
    Card(
        name="rotate_kv",
        title="RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via "
        "Outlier-Aware Adaptive Rotations",
        claim="after a rotation and a channel order that tame outliers, 2 bits a number suffice",
        kind="cache",
        family="decode",
        year=2025,
        paper=118,
        cost="2·bits/8 bytes a channel and 4 bytes a group, for keys and values; "
        "O(n·D·log D) per decoded token",
        decoding="all keys and values are decoded at each step, which takes longer than reading a "
        "full cache (`quarot` is read as it lies); decoded tokens are quantised too",
        confidence="operators checked against the released code; whether the paper keeps a "
        "recent window in full precision was not (the code keeps none)",
        small={"bits": 2, "sinks": 2},
    )
)
@dataclass(frozen=True, kw_only=True)
class RotateKV(Codec):
    """Codes of `bits` for keys before their rotary embedding, and for values.

    Keys turn by a Hadamard matrix over `heads` kv heads (one where these do not divide evenly),
    values by one per head. Key channels are then ordered by their sum over the first prefill
    (`key`: signed, abs, or none). Per token, `group` channels share a scale (the head dim where
    `group` does not fit); their range is clipped by `clip` (None: 0.8 at 2 bits, else 1). Tokens
    that hold the `sinks` largest entries of a layer's input stay exact as well.
    """

    pre_rope: ClassVar[bool] = True

    bits: int = 4
    group: int = 128
    heads: int = 4
    key: str = "signed"
    clip: float | None = None
    sinks: int = 20
    rotate: bool = True

    def __post_init__(self) -> None:
        ops.check_block("group", self.group)
        ops.check_block("heads", self.heads)
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")
        if self.key not in ("signed", "abs", "none"):
            raise ValueError(f"key must be signed, abs or none, got {self.key!r}")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ValueError(f"clip must be above 0 and at most 1, got {self.clip}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")

    def encode(self, k: Tensor, v: Tensor, *, valid: Tensor | None, state: Packed) -> Packed:
        """Codes, scales and zeros of keys (B, n, ·) and of values (B, n, Hkv, ·)."""
        keys, values = k.float().transpose(1, 2), v.float().transpose(1, 2)
        keys = self._turn_keys(keys).flatten(2)
        if self.key != "none":
            if not state:
                state["order"] = self._calibrate(keys, valid)
            keys = _reorder(keys, state["order"].long())
        values = ops.hadamard(values) if self.rotate else values
        clip = self.clip or (0.8 if self.bits == 2 else 1.0)
        packed: Packed = {}
        for name, x in (("k", keys), ("v", values)):
            group = self._group(x.shape[-1], k.shape[3])
            parts = ops.quantize(x, self.bits, group=group, clip=clip)
            packed |= {name + part: held for part, held in zip(_PARTS, parts, strict=True)}
        return packed

    def decode(self, packed: Packed, *, state: Packed) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hkv, n, D) float32."""
        heads, dim = packed["v"].shape[2], packed["v"].shape[3] * 8 // self.bits
        read = {}
        for name, width in (("k", heads * dim), ("v", dim)):
            parts = ops.Quantized(*(packed[name + part] for part in _PARTS))
            read[name] = ops.dequantize(parts, self.bits, group=self._group(width, dim))
        keys = _reorder(read["k"], state["order"].argsort(1)) if state else read["k"]
        keys = self._turn_keys(keys.unflatten(2, (heads, dim)))
        values = ops.hadamard(read["v"]) if self.rotate else read["v"]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def exact(self, hidden: Tensor, valid: Tensor | None) -> Tensor | None:
        """The tokens that hold the `sinks` entries of largest magnitude, row by row."""
        if not self.sinks:
            return None
        size = hidden.abs()
        if valid is not None:
            size = size.masked_fill(~valid[..., None], -1)
        best = size.flatten(1).topk(min(self.sinks, size[0].numel()))
        chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return chosen.scatter_(1, best.indices // hidden.shape[2], best.values >= 0)

    def claimed_bytes(
        self,
        seen: int,
        prompt: int,
        *,
        kv_heads: int,
        dim: int,
        itemsize: int,
        exact: int | None = None,
    ) -> float:
        """Codes, scales and zeros of every token, the channel order, and the exact tokens."""
        width = kv_heads * dim
        keys = ops.quantized_bytes(width, self.bits, group=self._group(width, dim))
        values = kv_heads * ops.quantized_bytes(dim, self.bits, group=self._group(dim, dim))
        order = 0 if self.key == "none" else 4 * width
        kept = min(self.sinks, prompt) if exact is None else exact
        return float(seen * (keys + values) + order + kept * (2 * width * itemsize + 4))

    def _group(self, width: int, dim: int) -> int:
        """Channels of a group in a row of `width`: `group`, or the head dim where it is no part."""
        return dim if width % self.group else self.group

    def _turn_keys(self, keys: Tensor) -> Tensor:
        """Keys (B, n, Hkv, D) times a Hadamard matrix over groups of heads, its own inverse."""
        if not self.rotate:
            return keys
        b, n, heads, dim = keys.shape
        joined = self.heads if heads % self.heads == 0 else 1
        return ops.hadamard(keys.reshape(b, n, heads // joined, joined * dim)).view(keys.shape)

    def _calibrate(self, keys: Tensor, valid: Tensor | None) -> Tensor:
        """Channels (B, Hkv·D) by ascending sum over a row's real tokens."""
        wide = keys.double().abs() if self.key == "abs" else keys.double()
        if valid is not None:
            wide = wide * valid[..., None]
        return wide.sum(1).argsort(dim=1, stable=True).to(torch.int32)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Channels of x (B, n, C) in the order (B, C)."""
    return x.gather(2, order[:, None].expand_as(x))
