"""MiniMax-M1 (2025, paper 305): the cost of long answers, and tokens that learn nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.bench.claims import Outcome
from foveate.nn.linear.minimax_m1 import cispo_loss, group_advantages

CLAIM = "seven lightning layers in eight make long answers cheap, and no clipped token goes unheard"

# Sizes of the published model: 80 layers of 64 heads of 128, 8 of them for keys and values.
_LAYERS, _DIM, _HEADS, _KV_HEADS, _WIDTH = 80, 6144, 64, 8, 128
_TOKENS = 100_000
_ANSWERS, _STEPS, _EPOCHS, _UPPER, _LOWER = 64, 20, 4, 0.2, 0.2


def measure() -> Outcome:
    """Operations and memory of attention at 100,000 tokens, and two objectives on a bandit.

    Of two arms the better one is tried by groups of 64, each learned from in 4 passes.
    """
    softmax, hybrid = _operations(0), _operations(7)
    figures = {
        "operations of attention, hybrid / softmax": hybrid / softmax,
        "decoding memory, hybrid / softmax": _held(7) / _held(0),
    }
    for name in ("PPO", "CISPO"):
        silent, best = _bandit(name)
        figures[f"tokens without a gradient, {name}"] = silent
        figures[f"share of the better arm, {name}"] = best
    cheap = hybrid / softmax < 0.5 and figures["decoding memory, hybrid / softmax"] < 0.5
    heard = figures["tokens without a gradient, CISPO"] == 0
    return Outcome(figures, cheap and heard and figures["tokens without a gradient, PPO"] > 0)


def _operations(lightning: int) -> float:
    """Multiply-adds to write `_TOKENS`, projections of attention included, `lightning` in 8."""
    heads, kv = _HEADS * _WIDTH, _KV_HEADS * _WIDTH
    own = _TOKENS * _DIM * (2 * heads + 2 * kv) + _TOKENS**2 * heads
    linear = _TOKENS * _DIM * 5 * heads + 2 * _TOKENS * heads * _WIDTH
    return _LAYERS / 8 * (lightning * linear + (8 - lightning) * own)


def _held(lightning: int) -> float:
    """Numbers that decoding keeps after `_TOKENS`."""
    own, linear = 2 * _TOKENS * _KV_HEADS * _WIDTH, _HEADS * _WIDTH**2
    return _LAYERS / 8 * (lightning * linear + (8 - lightning) * own)


def _bandit(objective: str) -> tuple[float, float]:
    """Share of tokens without a gradient, and the probability of the better arm at the end."""
    made = torch.Generator().manual_seed(0)
    logits = torch.zeros(2, requires_grad=True)
    silent = 0.0
    for _ in range(_STEPS):
        with torch.no_grad():
            arms = torch.multinomial(logits.softmax(0), _ANSWERS, True, generator=made)
            old = logits.log_softmax(0)[arms]
        advantages = group_advantages((arms == 1).float())
        for _ in range(_EPOCHS):
            log_p = logits.log_softmax(0)[arms]
            own = log_p.detach().requires_grad_()
            (grad,) = torch.autograd.grad(_loss(objective, own, old, advantages), own)
            silent += float(((grad == 0) & (advantages != 0)).float().mean())
            (step,) = torch.autograd.grad(log_p, logits, grad)
            with torch.no_grad():
                logits -= 0.5 * step
    return silent / (_STEPS * _EPOCHS), float(logits.detach().softmax(0)[1])


def _loss(objective: str, log_p: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """CISPO, or PPO's clipped ratio, of answers of one token."""
    if objective == "CISPO":
        return cispo_loss(log_p[:, None], old[:, None], advantages, upper=_UPPER)
    ratio = (log_p - old).exp()
    clipped = ratio.clamp(1 - _LOWER, 1 + _UPPER)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()
