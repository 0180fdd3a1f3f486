"""Hymba: attention heads and state-space heads side by side (2024, paper 221)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._held import Held, attend_held, token_positions, turned
from foveate.nn._linear import head_width
from foveate.nn._recurrent import Recurrent, State
from foveate.nn._stack import SwiGLU
from foveate.nn.linear.s6 import SelectiveScan
from foveate.registry import Card, register


@dataclass(frozen=True)
class HymbaState(State):
    """Of each layer: keys and values (None where they are another's), and the two of its scan."""

    held: tuple[Held | None, ...] = ()
    scans: tuple[tuple[Tensor | None, Tensor | None], ...] = ()


class HybridHeads(nn.Module):
    """Attention and a selective scan on projections of one input, normed, averaged, projected.

    Tokens see the `window` before them, all where it is None, and the first `always`. A layer that
    `borrows` has no keys and values of its own.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        *,
        window: int | None,
        always: int,
        borrows: bool,
        states: int,
        expand: float,
        conv: int,
        theta: float | None,
        **made: Any,
    ) -> None:
        super().__init__()
        self.width = head_width(dim, heads, expand)
        self.window, self.always, self.theta, self.borrows = window, always, theta, borrows
        channels, kept = heads * self.width, 0 if borrows else kv_heads * self.width
        self.sizes = (channels, channels, channels, kept, kept)
        self.inner = nn.Linear(dim, sum(self.sizes), bias=False, **made)
        self.scan = SelectiveScan(
            channels, -(-dim // 16), states=states, conv=conv, normed=True, **made
        )
        self.norms = nn.ModuleList(nn.RMSNorm(channels, 1e-6, **made) for _ in range(2))
        self.out = nn.Linear(channels, dim, bias=False, **made)

    def forward(
        self,
        x: Tensor,
        at: Tensor,
        real: Tensor,
        held: Any,
        scan: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Held, tuple[Tensor, Tensor]]:
        """x (B, L, dim) at positions `at` (B, L) -> y, all keys and values, the scan's states.

        held (`Held`) are those of tokens before, None for none, or all that are borrowed.
        """
        q, inner, gate, k, v = self.inner(x).split(self.sizes, -1)
        q, k, v = (heads_of(y, self.width) for y in (q, k, v))
        if not self.borrows:
            fresh = Held(turned(k, at, self.theta), v, at, real)
            held = fresh if held is None else held.joined(fresh)
        first = torch.zeros_like(at) if self.window is None else at - self.window
        seen = attend_held(turned(q, at, self.theta), at, first, held, self.always)
        y, *after = self.scan(inner, real, *scan)
        parts = zip(self.norms, (joined_heads(seen), y * silu(gate)), strict=True)
        mean = torch.stack([norm(part) for norm, part in parts]).mean(0)
        return self.out(mean), held, (after[0], after[1])

    def kept(self, held: Held, at: Tensor) -> Held | None:
        """What a token after the last of those at (B, L) can see of what this layer owns."""
        if self.borrows:
            return None
        last = at[:, -1]
        first = torch.zeros_like(last) if self.window is None else last + 1 - self.window
        return held.since(first, self.always)


class Layer(nn.Module):
    """x + heads(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, heads: HybridHeads, dim: int, mlp: int, **made: Any) -> None:
        super().__init__()
        self.heads, self.mlp = heads, SwiGLU(dim, mlp, **made)
        self.norms = nn.ModuleList(nn.RMSNorm(dim, **made) for _ in range(2))

    def forward(self, x: Tensor, *call: Any) -> tuple[Tensor, Held, tuple[Tensor, Tensor]]:
        """As `HybridHeads`."""
        y, held, scan = self.heads(self.norms[0](x), *call)
        x = x + y
        return x + self.mlp(self.norms[1](x)), held, scan


@register(
    Card(
        name="hymba",
        title="Hymba: A Hybrid-head Architecture for Small Language Models",
        year=2024,
        paper=221,
        claim="attention that recalls and a state that sums up, in one layer, need a small cache",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·D·(window + N)) time, O(L²·D) in three layers",
        decoding="keys and values of the window and the meta tokens, one set for two layers, of "
        "all tokens in three layers; the states of the scans",
        confidence="high for the block; medium for the pairs of layers",
        small={
            "dim": 32, "heads": 4, "kv_heads": 2, "depth": 6, "window": 8, "meta": 3, "states": 4,
        },
    )
)  # fmt: skip
class Hymba(Recurrent):
    """Layers of hybrid heads and MLPs after `meta` learned tokens, which every token sees.

    The first, middle and last of `depth` layers attend to all tokens, the others to the `window`
    before a token and itself; two such layers in a row share keys and values. Inner channels are
    expand · dim; `mlp` is the inner width of MLPs (None: 4 dim). Raises ValueError for sizes that
    do not fit.
    """

    State = HymbaState

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        depth: int = 3,
        window: int = 1024,
        meta: int = 128,
        states: int = 16,
        expand: float = 2.0,
        conv: int = 4,
        mlp: int | None = None,
        theta: float | None = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_heads = heads if kv_heads is None else ops.check_block("kv_heads", kv_heads)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        if meta < 0:
            raise ValueError(f"meta must be at least 0, got {meta}")
        options = {"states": states, "expand": expand, "conv": conv, "theta": theta, **made}
        self.layers = nn.ModuleList(
            Layer(
                HybridHeads(
                    dim,
                    heads,
                    kv_heads,
                    window=None if kind == "all" else ops.check_block("window", window),
                    always=meta,
                    borrows=kind == "borrows",
                    **options,
                ),
                dim,
                4 * dim if mlp is None else mlp,
                **made,
            )
            for kind in layer_kinds(depth)
        )
        self.meta = nn.Parameter(torch.randn(meta, dim, **made) * 0.02)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """All layers, meta tokens first where nothing was seen before."""
        meta = len(self.meta)
        fresh = not state.held
        if fresh:
            x = torch.cat((self.meta.expand(len(x), -1, -1), x), 1)
            valid = None if valid is None else pad(valid, (meta, 0), value=True)
        at, real = token_positions(state.pos, x.shape[1], valid, 0 if fresh else meta)
        count = len(self.layers)
        olds, scans = state.held or (None,) * count, state.scans or ((None, None),) * count
        kept, after, held = [], [], None
        for layer, old, scan in zip(self.layers, olds, scans, strict=True):
            heads: Any = layer.heads
            x, held, scan = layer(x, at, real, held if heads.borrows else old, scan)
            kept.append(heads.kept(held, at))
            after.append(scan)
        y = x[:, meta:] if fresh else x
        return y, HymbaState(state.layer, state.pos, held=tuple(kept), scans=tuple(after))


def layer_kinds(depth: int) -> list[str]:
    """Of each layer: sees "all" tokens, or a window and "owns" or "borrows" keys and values.

    Raises ValueError for less than one layer.
    """
    everywhere = {0, (ops.check_block("depth", depth) - 1) // 2, depth - 1}
    kinds: list[str] = []
    for i in range(depth):
        if i in everywhere:
            kinds.append("all")
        else:
            kinds.append("borrows" if kinds[-1] == "owns" else "owns")
    return kinds
