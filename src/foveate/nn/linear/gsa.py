"""Gated Slot Attention for Efficient Linear-Time Sequence Modeling (2024, paper 245)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from foveate import ops
from foveate.nn._attention import heads_of
from foveate.nn._linear import JointReadout, head_width
from foveate.nn._recurrent import Recurrent, State
from foveate.registry import Card, register


@dataclass(frozen=True)
class Slots(State):
    """What decoding keeps: keys s (B, Hkv, D, M) and values (B, Hkv, M, D) of M slots.

    z (B, Hkv, M) is the log-sum-exp of what was written to each slot, where nothing is forgotten.
    """

    values: Tensor | None = None


@register(
    Card(
        name="gsa",
        title="Gated Slot Attention for Efficient Linear-Time Sequence Modeling",
        year=2024,
        paper=245,
        claim="slots that forget, read by softmax, recall more than a plain state of their size",
        kind="module",
        family="linear",
        pretrained="fine-tune",
        cost="O(L·D·M) time for M slots",
        decoding="keys and values of M slots, 2 · M · D numbers a kv head",
        confidence="high",
        small={"dim": 32, "heads": 4, "kv_heads": 2, "slots": 8},
    )
)
class GSA(Recurrent):
    """Softmax attention to `slots` keys and values of each head, running averages of the tokens'.

    Slot m keeps a_m of itself and takes 1 - a_m of a token, a a sigmoid of the input to the power
    of 1 / `normalizer`. Not `gated` (ABC: attention with bounded memory), a slot is the softmax
    average of all tokens instead. `kv_heads` None is one for each head, `slots` None the width of
    a head. Raises ValueError for sizes that do not divide.
    """

    State = Slots

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        slots: int | None = None,
        gated: bool = True,
        normalizer: float = 8.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width = head_width(dim, heads)
        kv_heads = heads if kv_heads is None else ops.check_block("kv_heads", kv_heads)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        if normalizer <= 0:
            raise ValueError(f"normalizer must be above 0, got {normalizer}")
        self.slots = self.width if slots is None else ops.check_block("slots", slots)
        self.gated, self.normalizer = gated, normalizer
        self.q = nn.Linear(dim, dim, bias=False, **made)
        self.k, self.v = (
            nn.Linear(dim, kv_heads * self.width, bias=False, **made) for _ in range(2)
        )
        self.write = nn.Linear(dim, kv_heads * self.slots, bias=False, **made)
        self.readout = JointReadout(dim, dim, gate=None, **made)

    def run(self, x: Tensor, valid: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Attention to the slots, SiLU, norm and projection."""
        out, state = self.attend(x, valid, state)
        return self.readout(silu(out), x), state

    def attend(self, x: Tensor, valid: Tensor | None, state: Slots) -> tuple[Tensor, Slots]:
        """What the slots give each head (B, H, L, width), and the state after.

        Two recurrences: the keys of the slots give the weights with which their values are read.
        """
        q, k, v = (heads_of(silu(y), self.width) for y in (self.q(x), self.k(x), self.v(x)))
        share, keep, z = self._shares(heads_of(self.write(x), self.slots).float(), valid, state.z)
        share = share.to(x.dtype)
        scores, s = ops.scan(
            q, k, share, decay=keep, side="value", scale=1.0, state=state.s, valid=valid
        )
        weights = scores.float().softmax(-1).to(x.dtype)
        out, values = ops.scan(
            weights, share, v, decay=keep, side="key", scale=1.0, state=state.values, valid=valid
        )
        return out, replace(state, s=s, values=values, z=z)

    def _shares(
        self, logits: Tensor, valid: Tensor | None, z: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What each slot takes of a token, log of what it keeps (B, Hkv, L, M), and z after it."""
        if self.gated:
            keep = logsigmoid(logits) / self.normalizer
            return -torch.expm1(keep), keep, None
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, :, None], -torch.inf)
        return ops.prefix_softmax_gate(logits, z)
