"""The small training loop: AdamW, warm-up and cosine, clipped gradients, a fresh batch a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from foveate.tasks.checkpoint import Checkpoint


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float = 3e-3,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    seen: Callable[[int, float], None] | None = None,
    keep: Checkpoint | None = None,
) -> list[float]:
    """Minimise `loss(step)`, which makes its own batch, and return the loss of every step.

    The rate rises over the share `warmup` of the steps to `lr` and falls along a cosine to 0;
    gradients are clipped to norm `clip`; `seen(step, loss)` hears of every step. `keep` writes
    checkpoints, and a training whose folder has one goes on from there, exactly as if it had not
    been interrupted, where `loss` depends on nothing but the step and torch's random numbers.
    Raises ValueError for numbers out of range, RuntimeError, naming the step, when the loss is no
    number: nothing of that step is kept.
    """
    if steps < 1 or lr <= 0 or not 0 <= warmup < 1:
        raise ValueError(
            f"fit needs steps >= 1, lr > 0 and warmup in [0, 1), got {steps}, {lr} and {warmup}"
        )
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("fit got no parameter that requires a gradient")
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    settings = {"steps": steps, "lr": lr, "warmup": warmup, "decay": weight_decay, "clip": clip}
    first = 0 if keep is None else keep.resume(optimizer, settings)
    losses = [] if keep is None else keep.losses
    for step in range(first, steps):
        rate = lr * schedule(step / steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss(step)
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            kept = "" if keep is None else f"; the last good checkpoint is in {keep.folder}"
            raise RuntimeError(
                f"the loss is {losses[-1]} at step {step} of {steps}: lower the learning rate "
                f"({lr}) or clip harder ({clip}){kept}"
            )
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        if keep is not None:
            keep.note(step, losses[-1], rate)
            if (step + 1) % keep.every == 0 or step + 1 == steps:
                keep.save(optimizer)
        if seen is not None:
            seen(step, losses[-1])
    return losses


def schedule(done: float, warmup: float) -> float:
    """Share of the full rate when the share `done` of the steps is done."""
    if done < warmup:
        return (done + 0.01) / (warmup + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
