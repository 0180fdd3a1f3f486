"""TLinFormer: a history that is compressed, worked on and restored (2025, paper 201)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from foveate import ops
from foveate.nn._attention import heads_of, joined_heads
from foveate.nn._held import Held, attend_held, token_positions, turned
from foveate.nn._linear import head_width
from foveate.nn._recurrent import Recurrent, State
from foveate.nn._stack import SwiGLU, gated_width
from foveate.ops.memory_scan import stretches
from foveate.registry import Card, register


class History(NamedTuple):
    """Keys and values (B, H, n, D) of the history in one layer, and which are real (B, n)."""

    keys: Tensor
    values: Tensor
    real: Tensor

    def read(self, q: Tensor) -> Tensor:
        """Attention of q (B, H, L, D) to all of it; 0 where there is none."""
        mask = None if bool(self.real.all()) else ops.padding(self.real)
        return ops.attend(q, self.keys, self.values, mask=mask)


@dataclass(frozen=True)
class TLinState(State):
    """Of all tokens x itself (B, n, dim); in each layer the history and the current window."""

    x: Tensor | None = None
    history: tuple[History, ...] = ()
    window: tuple[Held, ...] = ()


class Layer(nn.Module):
    """What a layer does to history and window alike: projections, and what comes after."""

    def __init__(self, dim: int, heads: int, mlp: int, theta: float | None, **made: Any) -> None:
        super().__init__()
        self.width, self.theta = head_width(dim, heads), theta
        self.norms = nn.ModuleList(nn.LayerNorm(dim, **made) for _ in range(2))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **made)
        self.out = nn.Linear(dim, dim, bias=False, **made)
        self.mlp = SwiGLU(dim, mlp, **made)

    def split(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated by positions `at` (B, L), and values, (B, H, L, D) each."""
        q, k, v = (heads_of(y, self.width) for y in self.qkv(self.norms[0](x)).chunk(3, -1))
        return turned(q, at, self.theta), turned(k, at, self.theta), v

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """x (B, L, dim) with what attention gave, (B, H, L, D), and an MLP."""
        x = x + self.out(joined_heads(attended))
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


@register(
    Card(
        name="tlinformer",
        title="Rethinking Transformer Connectivity: TLinFormer, A Path to Exact, Full "
        "Context-Aware Linear Attention",
        year=2025,
        paper=201,
        claim="softmax attention to a history that passes through a narrow waist: a window costs "
        "time in proportion to the history",
        kind="module",
        family="linear",
        pretrained="scratch",
        cost="O(L·(history + window)·D) time for one window, O(L²) over all windows",
        decoding="all tokens, keys and values of them in one layer of each block, of `history` "
        "tokens in the others, and of the current window",
        confidence="high (official code)",
        small={
            "dim": 32, "heads": 4, "blocks": 1, "block_layers": 3, "window": 8, "history": 6,
        },
    )
)  # fmt: skip
class TLinFormer(Recurrent):
    """Blocks of layers in which windows of tokens read a history: all tokens of earlier windows.

    The first layer of a block compresses the history to its last `history` positions, which read
    all of it, those in between work on these, the last lets all positions read them. History
    attends to both sides; a token of the window attends to the history and, causally, to the
    window, and the results are added. `mlp` is the inner width of MLPs (None: 8/3 dim). Raises
    ValueError for sizes that do not fit.
    """

    State = TLinState

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        blocks: int = 2,
        block_layers: int = 4,
        window: int = 256,
        history: int = 256,
        mlp: int | None = None,
        theta: float | None = 10_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        if block_layers < 2:
            raise ValueError(
                f"a block compresses and restores: block_layers must be at least 2, got "
                f"{block_layers}"
            )
        if theta is not None and head_width(dim, heads) % 2:
            raise ValueError(f"heads that rotate must have an even width, got {dim // heads}")
        self.window, self.history = (
            ops.check_block(name, size) for name, size in (("window", window), ("history", history))
        )
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = gated_width(dim) if mlp is None else mlp
        self.blocks = nn.ModuleList(
            nn.ModuleList(Layer(dim, heads, inner, theta, **made) for _ in range(block_layers))
            for _ in range(ops.check_block("blocks", blocks))
        )

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Window by window, in each row its own."""
        at, real = token_positions(state.pos, x.shape[1], valid)
        begun = at // self.window * self.window
        seen = _appended(state.x, x, at, real)
        history, window, outs = state.history, state.window, []
        for first, last in stretches(state.pos, x.shape[1], self.window):
            part = slice(first, last)
            if bool((at[:, first] == begun[:, first]).any()):
                history = self._compressed(seen, begun[:, first])
            y, window = self._read(
                x[:, part], at[:, part], real[:, part], begun[:, part], history, window
            )
            outs.append(y)
        after = TLinState(state.layer, state.pos, x=seen, history=history, window=window)
        return torch.cat(outs, 1), after

    def _compressed(self, x: Tensor, count: Tensor) -> tuple[History, ...]:
        """What layers keep of the first `count` (B,) tokens of x (B, n, dim); () for none."""
        length = int(count.max())
        if length == 0:
            return ()
        x, kept = x[:, :length], []
        at = torch.arange(length, device=x.device).expand(len(x), -1)
        real = at < count[:, None]
        narrow = count[:, None] - min(self.history, length) + at[:, : self.history]
        own, narrow = narrow >= 0, narrow.clamp(min=0)
        blocks: Any = self.blocks
        for block in blocks:
            compress, *between, restore = block
            q, k, v = compress.split(x, at)
            kept.append(History(k, v, real))
            few = narrow[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
            waist = x.gather(1, narrow[..., None].expand(-1, -1, self.dim))
            waist = compress.after(waist, kept[-1].read(q.gather(2, few)))
            for layer in between:
                asked, k, v = layer.split(waist, narrow)
                kept.append(History(k, v, own))
                waist = layer.after(waist, kept[-1].read(asked))
            _, k, v = restore.split(waist, narrow)
            kept.append(History(k, v, own))
            if block is not blocks[-1]:
                x = restore.after(x, kept[-1].read(q))
        return tuple(kept)

    def _read(
        self,
        x: Tensor,
        at: Tensor,
        real: Tensor,
        begun: Tensor,
        history: tuple[History, ...],
        window: tuple[Held, ...],
    ) -> tuple[Tensor, tuple[Held, ...]]:
        """Tokens of windows that have begun at `begun` (B, L), and what layers hold of them."""
        held: list[Held] = []
        blocks: Any = self.blocks
        for i, layer in enumerate(layer for block in blocks for layer in block):
            q, k, v = layer.split(x, at)
            own = Held(k, v, at, real)
            held.append(window[i].since(begun[:, 0]).joined(own) if window else own)
            out = attend_held(q, at, begun, held[-1])
            x = layer.after(x, out + history[i].read(q) if history else out)
        return x, tuple(held)


def _appended(old: Tensor | None, x: Tensor, at: Tensor, real: Tensor) -> Tensor:
    """All tokens by position: those of x (B, L, dim) that are real at positions `at`."""
    size = int(at[:, -1].max()) + 1
    before = x[:, :0] if old is None else old
    seen = pad(before, (0, 0, 0, size - before.shape[1]))
    spread = torch.zeros_like(seen).scatter_add(
        1, at.clamp(min=0)[..., None].expand_as(x), x * real[..., None]
    )
    return seen + spread
