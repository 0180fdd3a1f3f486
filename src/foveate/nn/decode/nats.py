"""Neural Attention Search: what to keep of every token, learned (2025, paper 190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, linear, one_hot

from foveate import ops
from foveate.nn._attention import AttentionLayer
from foveate.nn.decode._kept import EMPTY, GLOBAL, kept_for, last_seen, live_blocks, soft_attend
from foveate.ops import Mask
from foveate.registry import Card, register

# Tokens of a block of the prefill.
_BLOCK = 64


@dataclass(frozen=True)
class NatsState:
    """What decoding keeps: the tokens that a later query may see, of each kv head its own.

    keys and values (B, Hkv, m, D), positions at and kinds (B, Hkv, m), EMPTY where a head keeps
    less than m; pos counts the tokens seen.
    """

    keys: Tensor
    values: Tensor
    at: Tensor
    kinds: Tensor
    pos: int

    @property
    def kept(self) -> Tensor:
        """Tokens kept (B, Hkv)."""
        return (self.kinds != EMPTY).sum(-1)


@register(
    Card(
        name="nats",
        title="Neural Attention Search",
        year=2025,
        paper=190,
        claim="tokens that learned to be kept for ever, until the next such token, or for a window "
        "shrink the cache at equal quality",
        kind="module",
        family="decode",
        patterns=("causal self",),
        pretrained="fine-tune",
        cost="O(L²·D) time in training, less where blocks are dropped; O(L·D) memory",
        decoding="keys and values of Global tokens, of Local ones since the last Global one, and "
        "of the last window + 1 others, per kv head",
        confidence="high on mask, gradient and pressure (official kernels); gradients of hidden "
        "keys are those of the formula, which the kernels bound",
        small={"dim": 32, "heads": 4, "kv_heads": 2, "window": 3, "theta": 10_000.0},
        exempt={"mask honoured": "a hidden Global token still ends the reach of Local ones"},
    )
)
class Nats(AttentionLayer):
    """Attention to the tokens that a router keeps: Global, Local or Sliding, for each kv head.

    A query sees Global tokens, Local ones up to and with the next Global token, and Sliding ones
    `window` steps long; the first token is Global. In training types are drawn (Gumbel-softmax,
    straight through) and the last token is Global, too; `pressure` is added to the gradient of
    types by how long they are kept. `detach` keeps the router's gradient from x. Causal; with
    `theta` heads rotate by their positions.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        window: int = 16,
        pressure: float = 5e-7,
        detach: bool = False,
        head_dim: int | None = None,
        theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, kv_heads, head_dim=head_dim, theta=theta, **made)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        if pressure < 0:
            raise ValueError(f"pressure must be at least 0, got {pressure}")
        self.window = ops.check_block("window", window)
        self.pressure, self.detach = pressure, detach
        self.router = nn.Linear(dim, 3 * kv_heads, bias=False, **made)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        causal: bool = True,
        mask: Mask | None = None,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """x (B, L, dim) -> y (B, L, dim), with `return_state` (y, state).

        With a state, x goes on where it ended. `mask` joins causality, on absolute positions.
        Raises ValueError for a context, without causality, and for a state in training.
        """
        if context is not None or not causal:
            raise ValueError("nats is causal self-attention: got a context or causal=False")
        old = 0 if state is None else state.pos
        q, k, v = self.split(x, x)
        q, k = self._turned(q, old), self._turned(k, old)
        if self.training:
            if state is not None or return_state:
                raise ValueError("nats keeps a state for decoding only: call eval() first")
            out = soft_attend(q, k, v, self.types(x, mask=mask), self.window, mask)
            return self.joined(out)
        at = torch.arange(old, old + x.shape[1], device=x.device).expand(k.shape[:3])
        kinds = self.types(x, first=old == 0, mask=mask).argmax(-1)
        if state is not None:
            k, v = torch.cat((state.keys, k), 2), torch.cat((state.values, v), 2)
            at, kinds = torch.cat((state.at, at), 2), torch.cat((state.kinds, kinds), 2)
        last = last_seen(kinds, at, self.window)
        y = self.joined(self._kept_only(q, k, v, at, last, old + x.shape[1], mask))
        if not return_state:
            return y
        return y, _packed(k, v, at, kinds, last, old + x.shape[1])

    def types(self, x: Tensor, first: bool = True, mask: Mask | None = None) -> Tensor:
        """One-hot types (B, Hkv, L, 3) of tokens x; `first`: they begin the sequence."""
        x = x.detach() if self.detach else x
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = linear(x.to(wide), self.router.weight.to(wide))
        logits = logits.unflatten(-1, (self.kv_heads, 3)).transpose(1, 2)
        if not self.training:
            types = one_hot(logits.argmax(-1), 3).to(wide)
            return _forced(types, _begins(x, mask)) if first else types
        last = torch.arange(x.shape[1], device=x.device) == x.shape[1] - 1
        types = _forced(gumbel_softmax(logits, hard=True), _begins(x, mask) | last)
        if types.requires_grad and self.pressure:
            price = self.pressure * kept_for(types.detach())
            types.register_hook(lambda grad: grad + price)
        return types

    def _kept_only(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        at: Tensor,
        last: Tensor,
        end: int,
        mask: Mask | None,
    ) -> Tensor:
        """Attention to slots (B, Hkv, m) at positions `at` up to the query that sees them last."""
        group, shift = self.heads // self.kv_heads, end - k.shape[2]

        def visible(b: Tensor, h: Tensor, q_at: Tensor, slot: Tensor) -> Tensor:
            seen = q_at + shift <= last[b, h // group, slot]
            if mask is not None:
                seen = seen & mask(b, h, q_at + shift, at[b, h // group, slot])
            return seen

        kept = Mask(visible, batch=q.shape[0], heads=self.heads, name="kept")
        if q.shape[2] == 1:
            return ops.attend(q, k, v, causal=True, mask=kept)
        layout = live_blocks(last - shift, q.shape[2], _BLOCK)
        return ops.block_sparse(q, k, v, layout, causal=True, mask=kept)


def _forced(types: Tensor, places: Tensor) -> Tensor:
    """The same types, but Global at places (1|B, L)."""
    fixed = torch.zeros_like(types[0, 0, 0])
    fixed[GLOBAL] = 1
    return torch.where(places[:, None, :, None], fixed, types)


def _begins(x: Tensor, mask: Mask | None) -> Tensor:
    """Where the rows of x (B, L, dim) begin, (1|B, L) bool: at their first real token."""
    if mask is None or mask.valid is None:
        return torch.arange(x.shape[1], device=x.device)[None] == 0
    return (mask.valid.cumsum(1) == 1) & mask.valid


def _packed(k: Tensor, v: Tensor, at: Tensor, kinds: Tensor, last: Tensor, end: int) -> NatsState:
    """The tokens that the query at position `end` or a later one may see, in order."""
    alive = last >= end
    width = max(int(alive.sum(-1).max()), 1)
    order = alive.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :width]
    wide = order[..., None].expand(*order.shape, k.shape[3])
    kinds = torch.where(alive, kinds, EMPTY).gather(-1, order)
    return NatsState(k.gather(2, wide), v.gather(2, wide), at.gather(-1, order), kinds, end)
