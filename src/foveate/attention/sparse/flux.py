"""Flux Attention: context-aware routing between full and sparse layers (2026, paper 237)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.attention._trained import Learner, ModelShape, Trainable, Trained
from foveate.attention.base import Attention, Call, Pattern, Result, dense_result
from foveate.ops import Mask
from foveate.registry import Card, register

# Logits (sparse, full) of a router before training: nearly always full.
_START = (0.0, 4.5)


@register(
    Card(
        name="flux",
        title="Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference",
        year=2026,
        paper=237,
        claim="a small router for each layer reads the prompt and decides whether the layer needs "
        "full attention or gets by with sinks and a window",
        kind="attention",
        family="sparse",
        patterns=("causal self",),
        pretrained="approximate",
        phases=("prefill", "decode"),
        selection_causal=False,
        cost="O(L²·D) in full layers, O(L·(sinks + window)·D) in sparse ones; O(L·D) memory",
        decoding="each layer keeps the decision of the prompt",
        confidence="high: official code; multipliers start at 0.25 where it draws from [0, 0.5)",
        small={"block": 16, "sinks": 2, "window": 16, "pool": 8},
        full={"window": 1 << 30},
        exempt={"acts": "before its routers are trained every layer is full attention"},
    )
)
@dataclass(frozen=True, kw_only=True)
class Flux(Trainable, Attention):
    """Full attention, or the first `sinks` and the last `window` tokens, as a router decides.

    A layer's router reads the mean of the first and last `pool` queries of the prompt, before
    rotation; the routers are in the file `router` that `foveate train` writes ("": full attention
    everywhere). Decoding keeps the prompt's decision; a prompt read without it counts as full.
    `targets` are the shares of sparse layers that training aims at, one for each of its texts.
    """

    trained: ClassVar[str] = "router"
    stateful: ClassVar[bool] = True

    block: int = 64
    sinks: int = 128
    window: int = 1024
    pool: int = 100
    targets: tuple[float, ...] = (0.45,)
    router: str = ""

    def __post_init__(self) -> None:
        for name in ("block", "window", "pool"):
            ops.check_block(name, getattr(self, name))
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if not self.targets or not all(0 <= x <= 1 for x in self.targets):
            raise ValueError(f"targets must be shares in [0, 1], got {self.targets}")
        held = self.read()
        if held is not None:
            held.check_options(pool=self.pool)
            _routers(held)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        """The attention that the layer's decision names."""
        if self._is_full(q, k, call):
            return dense_result(q, k, v, call)
        return self.sparse.compute(q, k, v, call)

    @property
    def sparse(self) -> Pattern:
        """What a sparse layer does."""
        return _Streaming(block=self.block, sinks=self.sinks, window=self.window)

    @torch.no_grad()
    def _is_full(self, q: Tensor, k: Tensor, call: Call) -> bool:
        """The decision for this sequence, made at its prompt."""
        held, slot = self.read(), call.state.setdefault(call.layer, {})
        if held is None:
            return True
        if "full" not in slot:
            held.check_model(ModelShape.of(q, k, call))
            router = _routers(held)[call.layer].to(q.device)
            asked = call.phase == "prefill"
            slot["full"] = not asked or bool(router(_summary(q, k, call, self.pool)).argmax(-1))
        return bool(slot["full"])

    def learner(self, shape: ModelShape) -> Learner:
        """A router for every layer that says full."""
        return Routed(self, shape)


@dataclass(frozen=True, kw_only=True)
class _Streaming(Pattern):
    """What a sparse layer reads."""

    sinks: int
    window: int

    def mask(self, q_len: int, k_len: int, call: Call) -> Mask:
        """Sinks and a window."""
        band = ops.window(self.window)
        return band | ops.sinks(self.sinks) if self.sinks else band


class Router(nn.Module):
    """From the summary of a prompt (B, D) to the logits (B, 2) of sparse and full."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(dim, 8 * dim), nn.SiLU(), nn.Linear(8 * dim, 2 * dim))
        hidden = (nn.Linear(2 * dim, 4 * dim), nn.Linear(4 * dim, dim))
        last = nn.Linear(dim, 2)
        self.decide = nn.Sequential(hidden[0], nn.SiLU(), hidden[1], nn.SiLU(), last)
        with torch.no_grad():
            for layer in hidden:
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            last.weight.zero_()
            last.bias.copy_(torch.tensor(_START))

    def forward(self, x: Tensor) -> Tensor:
        """Decide."""
        logits: Tensor = self.decide(self.read(x))
        return logits


def _summary(q: Tensor, k: Tensor, call: Call, pool: int) -> Tensor:
    """Mean (B, D) over heads of the first and the last `pool` queries before rotation."""
    tables, lq = call.tables(k.shape[2]), q.shape[2]
    if tables is not None:
        q = ops.unrope(q, *(x[:, -lq:] for x in tables))
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    ends = q if lq <= 2 * pool else torch.cat((q[:, :, :pool], q[:, :, -pool:]), 2)
    return ends.mean((1, 2)).float()


@lru_cache(maxsize=8)
def _routers(held: Trained) -> nn.ModuleList:
    """The routers of a file; ValueError when it holds something else."""
    made = nn.ModuleList(Router(held.shape.dim) for _ in range(held.shape.layers))
    try:
        made.load_state_dict(held.weights)
    except RuntimeError as error:
        raise ValueError(f"{held.path} holds no routers for its model: {error}") from error
    return made.requires_grad_(False)


class Routed(Learner):
    """Routers of all layers, trained by the model's loss and a bound on how many say full."""

    through_model = True

    def __init__(self, mechanism: Flux, shape: ModelShape) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.routers = nn.ModuleList(Router(shape.dim) for _ in range(shape.layers))
        # Prices of a missed target and of its square, task by task: they climb their gradient.
        self.prices = nn.Parameter(torch.full((len(mechanism.targets), 2), 0.25))
        self.prices.register_hook(torch.neg)
        self.mechanism, self.done = mechanism, 0.0
        self.noise = torch.Generator().manual_seed(0)
        self.said: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """The attention a noisy router picks; its gradient sees a blend of both."""
        router, at = self.routers[call.layer], self.mechanism
        logits = router(_summary(q, k, call, at.pool))
        uniform = torch.rand(logits.shape, generator=self.noise).clamp_min(1e-9)
        gumbel = -(-uniform.log()).log().to(q.device)
        soft = torch.softmax((logits + gumbel) / temperature(self.done), -1)[:, 1]
        full = (soft > 0.5).float() - soft.detach() + soft
        self.said.append(full)
        share = full.to(v.dtype)[:, None, None, None]
        dense, sparse = dense_result(q, k, v, call).out, at.sparse.compute(q, k, v, call).out
        return share * dense + (1 - share) * sparse

    def loss(self, done: float, text: Tensor | None, task: int) -> Tensor:
        """The model's loss and the price of missing the task's share of sparse layers."""
        if text is None or task >= len(self.prices):
            raise ValueError(f"flux has {len(self.prices)} targets, but no target for text {task}")
        self.done = done
        gap = 1 - torch.stack(self.said).mean(0) - self.mechanism.targets[task]
        self.said.clear()
        once, squared = self.prices[task]
        return text + (once * gap.abs() + squared * gap.square()).mean()

    def weights(self) -> dict[str, Tensor]:
        """The routers."""
        return dict(self.routers.state_dict())


def temperature(done: float) -> float:
    """Of the noisy decision: along a cosine from 1.5 to 1 over the first 60 % of the steps."""
    return 1.25 + 0.25 * math.cos(math.pi * min(done / 0.6, 1.0))
