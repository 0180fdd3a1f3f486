"""Prism: Spectral-Aware Block-Sparse Attention (2026, paper 158)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import BlockSparse, Call
from foveate.ops import BlockLayout
from foveate.ops.tile import default_scale
from foveate.registry import Card, register


@register(
    Card(
        name="prism",
        title="Prism: Spectral-Aware Block-Sparse Attention",
        year=2026,
        paper=158,
        claim="pooled scores in two RoPE bands, each with its own temperature, find the blocks "
        "that full-width mean pooling blurs away",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="approximate",
        phases=("prefill",),
        selection_causal=False,
        cost="O(L·D + (L/block)²·D) to choose, density·L²·D to attend; O(L·D) memory",
        decoding="dense over the full cache",
        confidence="high: official code, with means over real tokens in a ragged last block",
        small={"block": 16, "p": 0.5},
        full={"p": 1.0},
    )
)
@dataclass(frozen=True, kw_only=True)
class Prism(BlockSparse):
    """Blocks that hold a share `p` of the pooled attention in the high or in the low RoPE band.

    The bands are the first `high` and the last `low` share of the rotary pairs and may overlap;
    dims beyond `rotary_dim` (None: all turn) count as low. `interleaved` says that pair i is dims
    (2i, 2i + 1), not (i, i + rotary_dim / 2). `calibrate` divides the logits of a band by what
    pooling left of its size, over the queries of this call. p >= 1 is dense attention.
    """

    p: float = 0.95
    high: float = 0.5
    low: float = 0.75
    calibrate: bool = True
    rotary_dim: int | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p <= 0:
            raise ValueError(f"p must be above 0, got {self.p}")
        for name, share in (("high", self.high), ("low", self.low)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be a share in (0, 1], got {share}")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(f"rotary_dim must be an even number from 2, got {self.rotary_dim}")

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, call: Call) -> BlockLayout | None:
        """The union of both bands' blocks, block 0 and the diagonal."""
        if self.p >= 1:
            return None
        lengths, b = (q.shape[2], k.shape[2]), self.block
        q_mean = ops.pool_blocks(q, b, lead=ops.TileGrid.of(*lengths, b).lead)
        k_mean = ops.pool_blocks(k, b)
        visible = ops.causal_map(lengths, (b, b)).to(q.device)
        factor = default_scale(call.scale, q.shape[3])
        chosen = torch.zeros_like(visible)
        for dims in self._bands(q.shape[3], q.device):
            logits = self._logits(q_mean, k_mean, dims) * factor
            probs = torch.softmax(logits.masked_fill(~visible, float("-inf")), -1)
            chosen = chosen | ops.top_p(probs, self.p, visible=visible)
        return ops.from_map(ops.force(chosen, visible, first=1, local=1), b, lengths)

    def _bands(self, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Dims of the high and of the low band."""
        width = dim // 2 * 2 if self.rotary_dim is None else self.rotary_dim
        if not 2 <= width <= dim:
            raise ValueError(f"prism needs 2 <= rotary_dim <= head dim {dim}, got {width}")
        order = torch.arange(width, device=device)
        pairs = order.view(-1, 2) if self.interleaved else order.view(2, -1).T
        n = width // 2
        fast, slow = (max(1, round(share * n)) for share in (self.high, self.low))
        rest = torch.arange(width, dim, device=device)
        return pairs[:fast].flatten(), torch.cat((pairs[n - slow :].flatten(), rest))

    def _logits(self, q: Tensor, k: Tensor, dims: Tensor) -> Tensor:
        """Products of pooled q (B, Hq, nQ, D), k (B, Hkv, nK, D) in a band, at full width's size.

        Without calibration that is a factor sqrt(D / d) for d of D dims.
        """
        q_band, k_band, share = q[..., dims], k[..., dims], dims.numel() / q.shape[-1]
        logits = ops.grouped_logits(q_band, k_band, share**-0.5)
        if not self.calibrate:
            return logits
        kept_k = (_rms(k_band) / _rms(k)).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return logits / (share**0.5 * (_rms(q_band) / _rms(q)) * kept_k)


def _rms(x: Tensor) -> Tensor:
    """Root mean square of every head, above 0: (B, H, n, d) -> (B, H, 1, 1)."""
    return x.square().mean((-1, -2), keepdim=True).sqrt().clamp_min(1e-12)
