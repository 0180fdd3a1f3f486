"""Core Context Aware Transformers for Long Context Language Modeling (2024, paper 231)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.attention._trained import Learner, ModelShape, Trainable
from foveate.attention.base import Attention, Call, Pattern, Result, dense_result
from foveate.ops import Mask
from foveate.ops.tile import cap, default_scale
from foveate.registry import Card, register


@register(
    Card(
        name="cca",
        title="Core Context Aware Transformers for Long Context Language Modeling",
        year=2024,
        paper=231,
        claim="far context as one core token a group, near context exactly, in one softmax, stays "
        "close to dense attention",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="fine-tune",
        phases=("prefill", "decode"),
        selection_causal=True,
        cost="O(L·(L/group + window + group)·D) time, O(L·D) memory",
        decoding="core tokens are kept with the sequence; a group becomes one when it is complete",
        confidence="medium-high on the equations; how cores are rotated and shared by grouped "
        "heads is our choice",
        small={"group": 8, "window": 16, "block": 16},
        full={"window": 1 << 30},
        exempt={"grouped heads": "heads that share keys share cores; repeated keys have their own"},
    )
)
@dataclass(frozen=True, kw_only=True)
class CCA(Trainable, Attention):
    """One core token for each far group of `group` tokens, and the last `window` tokens exactly.

    A core is the mean of the group's keys and values under the attention of the group's last
    query, averaged over the query heads that share a kv head. `core_rope` "last" pools keys before
    rotation and rotates the core to the group's last position, "post" pools them as they are.
    `count_bias` adds log(group) to the logit of a core. Groups whose last query was not seen, as in
    a prompt read by another mechanism, are read exactly, and so is everything under a mask of the
    call. Records count what is read exactly.

    The paper tunes a model's projections to its cores. With the model frozen, `foveate train`
    tunes one matrix for each layer and query head, which turns queries before rotation, and keeps
    them in the file `queries` ("": queries as they are).
    """

    trained: ClassVar[str] = "queries"
    stateful: ClassVar[bool] = True

    group: int = 16
    window: int = 1024
    core_rope: Literal["last", "post"] = "last"
    count_bias: bool = False
    block: int = 64
    queries: str = ""

    def __post_init__(self) -> None:
        for name in ("group", "block"):
            ops.check_block(name, getattr(self, name))
        if self.window < 0:
            raise ValueError(f"window must be at least 0, got {self.window}")
        if self.core_rope not in ("last", "post"):
            raise ValueError(f"core_rope must be last or post, got {self.core_rope!r}")
        held = self.read()
        if held is not None:
            cores = ("group", "window", "core_rope", "count_bias")
            held.check_options(**{name: getattr(self, name) for name in cores})
            shape = held.shape
            turn = (shape.layers, shape.q_heads, shape.dim, shape.dim)
            held.check_tensors("tuned queries", turn=turn)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Attention of the tuned queries."""
        held = self.read()
        if held is not None:
            held.check_model(ModelShape.of(q, k, call))
            q = _turned(q, held.weights["turn"][call.layer].to(q.device), k.shape[2], call)
        return self.attend(q, k, v, call)

    def learner(self, shape: ModelShape) -> Learner:
        """Matrices that leave queries as they are."""
        return Tuned(self, shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """Cores and local tokens, merged into one softmax."""
        first, core_k, core_v = self._cores(q, k, v, call)
        (lq, lk), count = (q.shape[2], k.shape[2]), core_k.shape[2]
        far = (lk - 1 - self.window) // self.group - first
        if call.mask is not None or min(far, count) <= 0:
            return dense_result(q, k, v, call)
        near = _Near(group=self.group, size=self.window, first=first, block=self.block)
        close = near.compute(q, k, v, call)
        at = torch.arange(lk - lq, lk, device=q.device)
        seen = _far(self.group, self.window, first)
        options = call.options() | {"mask": seen, "causal": False}
        out, lse = ops.attend(q, core_k, core_v, q_pos=at, return_lse=True, **options)
        if self.count_bias:
            lse = lse + math.log(self.group)
        local = cast(Tensor, close.lse)
        out, _ = ops.merge([(close.out, local), (out, lse)])
        return Result(out, local, close.layout)

    def _cores(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[int, Tensor, Tensor]:
        """The first group that has a core, and the cores from it on; new ones are kept."""
        g, slot = self.group, call.state.setdefault(call.layer, {})
        start, end = -(-(k.shape[2] - q.shape[2] + 1) // g) - 1, k.shape[2] // g
        new = self._pooled(q, k, v, call, start, end)
        first, held = slot.get("cca", (start, None))
        if held is None or first + held[0].shape[2] != start:
            first = start
        elif start == end:
            new = held
        else:
            new = (torch.cat((held[0], new[0]), 2), torch.cat((held[1], new[1]), 2))
        slot["cca"] = (first, new)
        return first, *new

    def _pooled(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, start: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """Core keys and values (B, Hkv, end - start, ·) of the groups that end in this call."""
        g, before = self.group, k.shape[2] - q.shape[2]
        tokens = slice(start * g, end * g)
        last = torch.arange(start, end, device=q.device) * g + g - 1
        keys, values = (x[:, :, tokens].unflatten(2, (-1, g)) for x in (k, v))
        weights = self.weights(q[:, :, last - before], keys, call)
        tables = call.tables(k.shape[2]) if self.core_rope == "last" else None
        if tables is not None:
            cos, sin = tables
            plain = ops.unrope(k[:, :, tokens], cos[:, tokens], sin[:, tokens])
            keys = plain.unflatten(2, (-1, g))
        pooled = [(weights[..., None] * x).sum(3).to(x.dtype) for x in (keys, values)]
        if tables is not None:
            pooled[0] = ops.rope(pooled[0], cos[:, last], sin[:, last])
        return pooled[0], pooled[1]

    def weights(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """Shares (B, Hkv, m, g) of a group's tokens: q (B, Hq, m, D), k (B, Hkv, m, g, D)."""
        wide = torch.promote_types(q.dtype, torch.float32)
        heads = q.unflatten(1, (k.shape[1], -1)).to(wide)
        scores = torch.einsum("bhcmd,bhmgd->bhcmg", heads, k.to(wide))
        scores = cap(scores * default_scale(call.scale, q.shape[3]), call.softcap)
        return scores.softmax(-1).mean(2)


@dataclass(frozen=True, kw_only=True)
class _Near(Pattern):
    """The tokens read exactly: those no core stands for."""

    group: int
    size: int
    first: int

    def mask(self, q_len: int, k_len: int, call: Call) -> Mask:
        """From the first group that reaches into the window on, and what precedes all cores."""
        return _local(self.group, self.size, self.first)


def _border(q: Tensor, group: int, size: int, first: int) -> Tensor:
    """The groups from `first` up to this one are cores for queries at q."""
    return torch.div(q - size, group, rounding_mode="floor").clamp_min(first)


def _local(group: int, size: int, first: int) -> Mask:
    """Keys before group `first` and from a query's border on."""

    def start(q: Tensor) -> Tensor:
        return _border(q, group, size, first) * group

    def bounds(b: Tensor, h: Tensor, *tile: Tensor) -> tuple[Tensor, Tensor]:
        q_lo, q_hi, k_lo, k_hi = tile
        some = (k_hi >= start(q_lo)) | (k_lo < first * group)
        return some, (k_lo >= start(q_hi)) | (k_hi < first * group)

    def runs(b: Tensor, h: Tensor, q: Tensor) -> Tensor:
        head = torch.stack((torch.zeros_like(q), torch.full_like(q, first * group)), -1)
        tail = torch.stack((start(q), torch.full_like(q, 1 << 40)), -1)
        return torch.stack((head, tail), -2)

    return Mask(
        lambda b, h, q, k: (k >= start(q)) | (k < first * group),
        bounds,
        name=f"local({group}, {size})",
        runs=runs,
    )


def _far(group: int, size: int, first: int) -> Mask:
    """Cores, the first of which has position 0, of the groups before a query's border."""

    def end(q: Tensor) -> Tensor:
        return _border(q, group, size, first) - first

    return Mask(
        lambda b, h, q, k: k < end(q),
        lambda b, h, q_lo, q_hi, k_lo, k_hi: (k_lo < end(q_hi), k_hi < end(q_lo)),
        name=f"far({group}, {size})",
        runs=lambda b, h, q: torch.stack((torch.zeros_like(q), end(q)), -1)[..., None, :],
    )


def _turned(q: Tensor, turn: Tensor, k_len: int, call: Call) -> Tensor:
    """Queries before rotation times one matrix (D, D) a head: turn (Hq, D, D)."""
    tables = call.tables(k_len)
    if tables is None:
        return q @ turn.to(q.dtype)
    cos, sin = (x[:, -q.shape[2] :] for x in tables)
    return ops.rope(ops.unrope(q, cos, sin) @ turn.to(q.dtype), cos, sin)


class Tuned(Learner):
    """Matrices for the queries of all layers, trained by the model's loss."""

    through_model = True

    def __init__(self, mechanism: CCA, shape: ModelShape) -> None:
        super().__init__()
        start = torch.eye(shape.dim).expand(shape.layers, shape.q_heads, -1, -1)
        self.turn, self.mechanism = nn.Parameter(start.clone()), mechanism

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention of the turned queries."""
        q = _turned(q, self.turn[call.layer], k.shape[2], call)
        return self.mechanism.attend(q, k, v, call).out

    def loss(self, done: float, text: Tensor | None, task: int) -> Tensor:
        """The model's loss."""
        if text is None:
            raise ValueError("cca is tuned through the model, but got no loss of it")
        return text
