"""SageAttention2: 4-bit queries and keys, 8-bit weights and values (2024, paper 113)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate import ops
from foveate.attention.base import Attention, Call, Result
from foveate.ops.tile import cap, default_scale, grouped_values
from foveate.registry import Card, register

_E4M3_MAX = 448.0


@register(
    Card(
        name="sage2",
        title="SageAttention2: Efficient Attention with Thorough Outlier Smoothing and "
        "Per-thread INT4 Quantization",
        year=2024,
        paper=113,
        claim="queries and keys in 4 bits after smoothing, weights and values in 8, change no "
        "metric and run about three times as fast as FlashAttention2",
        kind="attention",
        family="sparse",
        patterns=("causal self", "noncausal self", "causal cross", "noncausal cross"),
        pretrained="approximate",
        phases=("prefill",),
        selection_causal=False,
        cost="an emulation in floating point: O(L²·D) time, O(L·key_block) memory",
        decoding="dense: one query gains nothing",
        confidence="high: the paper; its 4-bit kernels are not public, groups are of rows, not "
        "of threads",
        small={"block": 32, "key_block": 16, "rows": 16, "pv": "fp16"},
        full={"qk_bits": None, "pv": "exact"},
    )
)
@dataclass(frozen=True, kw_only=True)
class Sage2(Attention):
    """Attention with smoothed operands, rounded as the kernels round them.

    `smooth_k` takes the mean key off (a shift of each row's logits), `smooth_q` the mean of every
    `block` queries, which is multiplied in full precision. Groups of `rows` queries and of
    `key_block` keys share a scale of `qk_bits` (None: no rounding). Weights, at most 1 under the
    running maximum, and values by channel are e4m3 with `pv` fp8, values alone are half precision
    with fp16. `smooth_v` takes the mean value off and adds it to the output. Gradients pass
    straight through the rounding.
    """

    block: int = 128
    key_block: int = 64
    rows: int = 32
    qk_bits: int | None = 4
    pv: Literal["fp8", "fp16", "exact"] = "fp8"
    smooth_q: bool = True
    smooth_k: bool = True
    smooth_v: bool = False

    def __post_init__(self) -> None:
        for name in ("block", "key_block", "rows"):
            ops.check_block(name, getattr(self, name))
        if self.block % self.rows:
            raise ValueError(f"rows must divide the block of {self.block}, got {self.rows}")
        if self.qk_bits not in (4, 8, None):
            raise ValueError(f"qk_bits must be 4, 8 or None, got {self.qk_bits}")
        if self.pv not in ("fp8", "fp16", "exact"):
            raise ValueError(f"pv must be fp8, fp16 or exact, got {self.pv!r}")

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Online softmax over key blocks, as a kernel does it, for all rows at once."""
        wide = torch.promote_types(q.dtype, torch.float32)
        dtype, scale = q.dtype, default_scale(call.scale, q.shape[3])
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        mean_k = k.mean(2, keepdim=True) if self.smooth_k else torch.zeros_like(k[:, :, :1])
        mean_v = v.mean(2, keepdim=True) if self.smooth_v else torch.zeros_like(v[:, :, :1])
        shift = ops.grouped_logits(q, mean_k, scale)
        k, v = k - mean_k, v - mean_v
        base = self._means(q, k.shape[2]) if self.smooth_q else torch.zeros_like(q)
        rest, v = self._rounded_q(q - base, k.shape[2]), self._rounded_v(v)
        rule = call.mask
        if call.causal:
            rule = ops.causal() if rule is None else rule & ops.causal()
        q_pos = torch.arange(q.shape[2], device=q.device) + max(k.shape[2] - q.shape[2], 0)
        top = torch.full_like(q[..., :1], -math.inf)
        total, out = torch.zeros_like(top), q.new_zeros(*q.shape[:3], v.shape[3])
        for lo in range(0, k.shape[2], self.key_block):
            keys = k[:, :, lo : lo + self.key_block]
            logits = ops.grouped_logits(rest, self._rounded(keys, (2, 3)), scale)
            logits = logits + ops.grouped_logits(base, keys, scale)
            if call.softcap is not None:  # a capped row is not free to shift
                logits = cap(logits + shift, call.softcap)
            if rule is not None:
                k_pos = torch.arange(lo, lo + keys.shape[2], device=q.device)
                seen = rule(*rule.axes(q.device), q_pos[:, None], k_pos)
                logits = logits.masked_fill(~seen, -math.inf)
            new = torch.maximum(top, logits.amax(-1, keepdim=True)).detach()
            safe = new.masked_fill(torch.isinf(new), 0)
            weights, old = torch.exp(logits - safe), torch.exp(top - safe)
            total = total * old + weights.sum(-1, keepdim=True)
            values = v[:, :, lo : lo + self.key_block]
            out, top = out * old + grouped_values(self._rounded_p(weights), values), new
        empty = total == 0
        total = total.masked_fill(empty, 1)
        mean_v = mean_v.repeat_interleave(q.shape[1] // k.shape[1], 1)
        out = (out / total + mean_v).masked_fill(empty, 0).to(dtype)
        lse = top + total.log() + (shift if call.softcap is None else 0)
        return Result(out, lse[..., 0])

    def _means(self, q: Tensor, k_len: int) -> Tensor:
        """Of every query the mean of its block: like q."""
        lead = ops.TileGrid.of(q.shape[2], k_len, self.block).lead
        means = ops.pool_blocks(q, self.block, lead=lead).repeat_interleave(self.block, 2)
        return means[:, :, lead : lead + q.shape[2]].to(q.dtype)

    def _rounded_q(self, q: Tensor, k_len: int) -> Tensor:
        """Queries rounded by groups of rows, cut on absolute positions."""
        lead = ops.TileGrid.of(q.shape[2], k_len, self.rows).lead
        groups = pad(q, (0, 0, lead, -(lead + q.shape[2]) % self.rows))
        groups = self._rounded(groups.unflatten(2, (-1, self.rows)), (3, 4))
        return groups.flatten(2, 3)[:, :, lead : lead + q.shape[2]]

    def _rounded(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Symmetric integers of `qk_bits` with one scale over `dims`."""
        if self.qk_bits is None:
            return x
        levels = 2 ** (self.qk_bits - 1) - 1
        step = x.detach().abs().amax(dims, keepdim=True) / levels
        step = step.masked_fill(step == 0, 1)
        return _through(x, torch.round(x / step) * step)

    def _rounded_v(self, v: Tensor) -> Tensor:
        """Values rounded by channel."""
        if self.pv != "fp8":
            return v if self.pv == "exact" else _through(v, v.half().to(v.dtype))
        step = v.detach().abs().amax(2, keepdim=True) / _E4M3_MAX
        step = step.masked_fill(step == 0, 1)
        return _through(v, _e4m3(v / step) * step)

    def _rounded_p(self, weights: Tensor) -> Tensor:
        """Weights in [0, 1] with the scale 1/448."""
        if self.pv != "fp8":
            return weights
        return _through(weights, _e4m3(weights * _E4M3_MAX) / _E4M3_MAX)


def _e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 numbers, in the dtype of x."""
    # A quotient may round to just above the largest number, where the format has only NaN.
    return x.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of x."""
    return x + (rounded - x).detach()
