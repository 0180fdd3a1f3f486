"""HySparse: hybrid sparse attention with an oracle full layer (2026, paper 223)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.nn._attention import rotary
from foveate.ops import BlockLayout, Mask
from foveate.registry import Card, register


@dataclass(frozen=True)
class HySparseState:
    """What decoding keeps: all keys and values (B, Hkv, pos, D) of the full layer, and of each
    sparse layer those of its last `window` tokens; pos counts the tokens seen.
    """

    keys: Tensor
    values: Tensor
    near: tuple[tuple[Tensor, Tensor], ...]
    pos: int


@register(
    Card(
        name="hysparse",
        title="HySparse: A Hybrid Sparse Attention Architecture with Oracle Token Selection and "
        "KV Cache Sharing",
        year=2026,
        paper=223,
        claim="sparse layers that reuse the keys and the measured block choice of one full layer "
        "beat windows in their place",
        kind="module",
        family="sparse",
        patterns=("causal self",),
        pretrained="scratch",
        selection_causal=True,
        cost="O(L²·D) in the full layer, O(L·(blocks·block + window)·D) in each sparse one",
        decoding="all keys and values of one layer, `window` of each other one",
        confidence="high on the equations, medium on sizes; one gate a head is our choice",
        small={
            "dim": 32,
            "heads": 4,
            "kv_heads": 2,
            "sparse_layers": 2,
            "block": 4,
            "blocks": 3,
            "window": 6,
        },
        exempt={"padding": "blocks are cut on positions, and padding has positions too"},
    )
)
class HySparse(nn.Module):
    """One full-attention layer and `sparse_layers` that read the blocks it found to matter.

    Each layer is x + attention(norm(x)), then x + mlp(norm(x)) with `mlp` times the width (0: no
    such part). A query of the full layer scores a block by its largest attention probability, the
    heads of a kv head by their maximum; in the sparse layers the same query position reads the
    `blocks` best blocks of `block` of the full layer's keys and values, and beside them its own
    last `window` tokens: both outputs are gated, head by head, and summed. Causal; heads rotate
    by their positions (`theta`).

    An architecture has no part that could be trained beside a frozen model. `foveate train`
    teaches these layers, from scratch, to give what as many layers in the middle of one give.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        sparse_layers: int = 3,
        block: int = 64,
        blocks: int = 16,
        window: int = 128,
        mlp: int = 4,
        theta: float = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        for name, size in (("block", block), ("blocks", blocks), ("window", window)):
            ops.check_block(name, size)
        if heads < 1 or dim % heads or dim // heads % 2 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"dim must be an even multiple of heads and heads one of kv_heads, "
                f"got dim {dim}, heads {heads}, kv_heads {kv_heads}"
            )
        if sparse_layers < 0 or mlp < 0:
            raise ValueError(
                f"sparse_layers and mlp must be at least 0, got {sparse_layers} and {mlp}"
            )
        self.options = {
            "dim": dim,
            "heads": heads,
            "kv_heads": kv_heads,
            "sparse_layers": sparse_layers,
            "block": block,
            "blocks": blocks,
            "window": window,
            "mlp": mlp,
            "theta": theta,
        }
        self.kv_heads, self.head_dim, self.theta = kv_heads, dim // heads, theta
        self.block, self.blocks, self.window = block, blocks, window
        sizes = (dim, heads, kv_heads, mlp)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.full = _Layer(*sizes, gates=0, **made)
        self.sparse = nn.ModuleList(_Layer(*sizes, gates=2, **made) for _ in range(sparse_layers))

    @property
    def depth(self) -> int:
        """Layers of a model that it stands for."""
        return 1 + len(self.sparse)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        causal: bool = True,
        mask: Mask | None = None,
        state: HySparseState | None = None,
        return_state: bool = False,
    ) -> Any:
        """x (B, L, dim) -> y (B, L, dim), with `return_state` (y, state).

        With a state, x goes on where it ended. `mask` joins causality, on absolute positions.
        Raises ValueError for a context, and without causality.
        """
        if context is not None or not causal:
            raise ValueError("hysparse is causal self-attention: got a context or causal=False")
        old = 0 if state is None else state.pos
        at = torch.arange(old, old + x.shape[1], device=x.device)
        tables = self._tables(at)
        q, k, v = self.full.project(x, tables)
        if state is not None:
            k, v = torch.cat((state.keys, k), 2), torch.cat((state.values, v), 2)
        out, lse = ops.attend(q, k, v, causal=True, mask=mask, return_lse=True)
        layout = self.select(q, k, lse, mask)
        x = self.full.finish(x, [out])
        near = []
        for i, layer in enumerate(cast(Iterable[_Layer], self.sparse)):
            q, own_k, own_v = layer.project(x, tables)
            if state is not None:
                own_k = torch.cat((state.near[i][0], own_k), 2)
                own_v = torch.cat((state.near[i][1], own_v), 2)
            far = ops.block_sparse(q, k, v, layout, causal=True, mask=mask)
            x = layer.finish(x, [far, self._windowed(q, own_k, own_v, at, mask)])
            last = slice(-self.window, None)
            near.append((own_k[:, :, last].clone(), own_v[:, :, last].clone()))
        if not return_state:
            return x
        return x, HySparseState(k, v, tuple(near), old + int(at.numel()))

    def step(self, x: Tensor, state: HySparseState | None = None) -> tuple[Tensor, HySparseState]:
        """One token x (B, dim) after those of the state: y (B, dim) and the state after it."""
        y, state = self.forward(x[:, None], state=state, return_state=True)
        return y[:, 0], state

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, lse: Tensor, mask: Mask | None = None) -> BlockLayout:
        """For every query and kv head its best blocks, from the full layer's attention."""
        most = ops.block_mass(
            q, k, lse, self.block, reduce_q="none", reduce_k="max", causal=True, mask=mask
        )
        score = most.unflatten(1, (self.kv_heads, -1)).amax(2)
        lengths = (q.shape[2], k.shape[2])
        visible = ops.causal_map(lengths, (1, self.block)).to(q.device)
        chosen = ops.top_k(score, self.blocks, visible=visible)
        return ops.from_map(chosen, (1, self.block), lengths)

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, mask: Mask | None) -> Tensor:
        """Attention of queries at positions `at` over the last `window` of their own keys."""
        if mask is None:
            layout = _band(self.window, q.shape[2], k.shape[2])
            return ops.block_sparse(q, k, v, layout, causal=True, mask=ops.window(self.window))
        end = int(at[-1]) + 1
        near = mask & ops.window(self.window)
        k_pos = torch.arange(end - k.shape[2], end, device=q.device)
        return ops.attend(q, k, v, causal=True, mask=near, q_pos=at, k_pos=k_pos)

    def _tables(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables (L, D) of positions."""
        return rotary(at, self.head_dim, self.theta)


class _Layer(nn.Module):
    """Projections, gates, norms and MLP of one layer."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, mlp: int, *, gates: int, **made: Any
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, width = heads, kv_heads, dim // heads
        self.norm = nn.RMSNorm(dim, **made)
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * width, bias=False, **made)
        self.gate = nn.Linear(dim, gates * heads, **made) if gates else None
        self.out = nn.Linear(dim, dim, bias=False, **made)
        self.mlp = (
            nn.Sequential(
                nn.RMSNorm(dim, **made),
                nn.Linear(dim, mlp * dim, bias=False, **made),
                nn.SiLU(),
                nn.Linear(mlp * dim, dim, bias=False, **made),
            )
            if mlp
            else None
        )

    def project(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, Hq, L, D) and k, v (B, Hkv, L, D), q and k rotated."""
        heads = self.qkv(self.norm(x)).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        parts = heads.transpose(1, 2).split((self.heads, self.kv_heads, self.kv_heads), 1)
        q, k = (ops.rope(y, *tables) for y in parts[:2])
        return q, k, parts[2]

    def finish(self, x: Tensor, outs: list[Tensor]) -> Tensor:
        """The layer's output from those of its branches (B, Hq, L, D)."""
        if self.gate is not None:
            gates = torch.sigmoid(self.gate(self.norm(x))).unflatten(-1, (len(outs), self.heads))
            gates = gates.permute(2, 0, 3, 1)[..., None]
            outs = [g * o for g, o in zip(gates, outs, strict=True)]
        total = torch.stack(outs).sum(0)
        x = x + self.out(total.transpose(1, 2).flatten(2))
        return x if self.mlp is None else x + self.mlp(x)


@lru_cache(maxsize=64)
def _band(window: int, q_len: int, k_len: int) -> BlockLayout:
    """The blocks a window touches."""
    block = (min(64, q_len), 64)
    return (ops.window(window) & ops.causal()).to_layout(q_len, k_len, block)
