"""What every mechanism of kind "attention" owes, checked on small random tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.attention.base import Attention, Call, Memory
from foveate.bench.audit import Check, Fault, Unfit, close, survives_copying
from foveate.registry import create

# Long enough that every mechanism's small options leave something out; ragged on purpose.
LENGTH, BATCH, HEADS, KV_HEADS, DIM = 157, 2, 4, 2, 16
STEPS = 12


def inputs(length: int = LENGTH, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (2, 4, L, 16), k and v (2, 2, L, 16), the same at every call."""
    made = torch.Generator().manual_seed(length)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(BATCH, h, length, DIM, generator=made).to(**options) for h in shapes)
    return 2 * q, k, v


def small(cls: Any, **options: Any) -> Attention:
    """The mechanism with options at which it acts on `LENGTH` tokens."""
    made: Attention = create(cls.card.name, **{**cls.card.small, **options})
    return made


def covering(cls: Any) -> Attention:
    """The mechanism with a budget that covers everything."""
    if not cls.card.full:
        raise Unfit("has no budget: it is exact")
    return small(cls, **cls.card.full)


def directed(cls: Any) -> bool:
    """Whether the mechanism is called causally: unless it is made for both sides only."""
    return any(pattern.startswith("causal") for pattern in cls.card.patterns)


def needs_direction(cls: Any) -> None:
    """Raise Unfit when the mechanism is not causal."""
    if not directed(cls):
        raise Unfit("attends to both sides: later tokens are meant to be seen")


def needs(cls: Any, phase: str) -> None:
    """Raise Unfit when the mechanism does not act in a phase."""
    if phase not in cls.card.phases:
        raise Unfit(f"acts in {cls.card.phases[0]} only; {phase} is dense attention")


def stepwise(attn: Attention, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Outputs of the last `STEPS` queries, decoded one at a time through four layers."""
    start, outs, memory = q.shape[2] - STEPS, [], Memory()
    for t in range(start, q.shape[2]):
        now = slice(0, t + 1)
        for layer in range(4):
            call = Call(layer=layer, layers=4, memory=memory)
            if t == start:
                call.valid = None if valid is None else valid[:, :start]
                attn.after_prefill(_last(q, call.valid, start), k[:, :, :start], call)
            call.phase, call.valid = "decode", None if valid is None else valid[:, now]
            out = attn(q[:, :, t : t + 1], k[:, :, now], v[:, :, now], call=call)
        outs.append(out)
    return torch.cat(outs, 2)


def _last(q: Tensor, valid: Tensor | None, start: int) -> Tensor:
    """The last real query of every row's prompt (B, H, 1, D)."""
    if valid is None:
        return q[:, :, start - 1 : start]
    ends = [int(row.nonzero()[-1]) for row in valid]
    return torch.stack([q[b, :, end : end + 1] for b, end in enumerate(ends)])


def prefilled(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, mask: ops.Mask | None = None, **options: Any
) -> Tensor:
    """A whole prefill; of a mechanism that keeps state the second of two denoising steps."""
    memory = Memory()
    for step in range(2 if attn.stateful else 1):
        call = Call(layer=3, layers=4, memory=memory, step=step, **options)
        out = attn(q, k, v, causal=directed(attn), mask=mask, call=call)
    return out


def result(attn: Attention, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """A whole prefill where the mechanism acts in prefill, else the last `STEPS` decoded."""
    if "prefill" in attn.card.phases:
        return prefilled(attn, q, k, v, valid=valid)
    return stepwise(attn, q, k, v, valid)


def fast_path(cls: Any) -> None:
    """The fast path gives what the plain reference gives."""
    attn, tensors = small(cls), inputs()
    fast = result(attn, *tensors)
    with ops.backend("reference"):
        close(fast, result(attn, *tensors))


def acts(cls: Any) -> None:
    """At small options the mechanism does something: it differs from dense attention."""
    if not cls.card.full:
        raise Unfit("is exact: it equals dense attention")
    attn, tensors = small(cls), inputs()
    got = result(attn, *tensors)
    dense = ops.attend(*tensors, causal=directed(cls))[:, :, -got.shape[2] :]
    gap = float((got - dense).abs().max())
    if gap < 1e-3:
        raise Fault(f"the options for the audit leave nothing out (gap {gap:.1e})")


def full_budget(cls: Any) -> None:
    """With an all-covering budget it equals dense attention, for a ragged chunk too."""
    attn, (q, k, v) = covering(cls), inputs()
    dense = ops.attend(q, k, v, causal=directed(cls))
    got = result(attn, q, k, v)
    close(got, dense[:, :, -got.shape[2] :])
    if "prefill" in cls.card.phases:
        close(prefilled(attn, q[:, :, -50:], k, v), dense[:, :, -50:])


def decode_is_prefill(cls: Any) -> None:
    """A decoded step gives what the same row of a prefill gives."""
    needs(cls, "prefill")
    needs(cls, "decode")
    if cls.stateful:
        raise Unfit("keeps state between steps: a step is not a row of a prefill")
    attn, (q, k, v) = small(cls), inputs()
    whole = result(attn, q, k, v)
    for t in (40, 100, LENGTH - 1):
        call = Call(layer=3, layers=4, phase="decode")
        step = attn(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], call=call)
        close(step, whole[:, :, t : t + 1])


def grouped_heads(cls: Any) -> None:
    """Grouped keys give what the same keys repeated for every query head give."""
    attn, (q, k, v) = small(cls), inputs()
    repeated = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    close(result(attn, q, k, v), result(attn, q, *repeated))


def _padding(cls: Any, left: bool) -> None:
    attn, (q, k, v) = small(cls), inputs()
    end = LENGTH if "prefill" in cls.card.phases else LENGTH - STEPS
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid[1, slice(0, 37) if left else slice(end - 37, end)] = False
    poisoned = [q.clone(), k.clone(), v.clone()]
    for x in poisoned:
        x[1].transpose(0, 1)[~valid[1]] = 1e3
    together = result(attn, poisoned[0], poisoned[1], poisoned[2], valid)
    real = valid[1]
    alone = result(attn, q[1:, :, real], k[1:, :, real], v[1:, :, real])
    kept = valid[1, -together.shape[2] :]
    close(together[1:, :, kept], alone)
    close(together[:1], result(attn, q[:1], k[:1], v[:1]))
    if together[1].transpose(0, 1)[~kept].abs().sum() > 0:
        raise Fault("padding queries give something other than 0")


def left_padding(cls: Any) -> None:
    """A left-padded row gives what the row alone gives; padding is never read."""
    _padding(cls, left=True)


def right_padding(cls: Any) -> None:
    """A right-padded row gives what the row alone gives; padding is never read."""
    _padding(cls, left=False)


def batch(cls: Any) -> None:
    """A row does not depend on its batch mates."""
    attn, tensors = small(cls), inputs()
    together = result(attn, *tensors)
    for b in range(BATCH):
        close(together[b : b + 1], result(attn, *(x[b : b + 1] for x in tensors)))


def no_look_ahead(cls: Any) -> None:
    """Later values carry no weight."""
    needs(cls, "prefill")
    needs_direction(cls)
    attn, (q, k, v) = small(cls), inputs()
    before = result(attn, q, k, v)
    v = v.clone()
    v[:, :, 90:] += 100
    close(result(attn, q, k, v)[:, :, :90], before[:, :, :90])


def choice_without_look_ahead(cls: Any) -> None:
    """Later tokens do not change what a query reads."""
    needs(cls, "prefill")
    needs_direction(cls)
    if not cls.card.selection_causal:
        raise Unfit("its card says that the choice sees later tokens")
    attn, tensors = small(cls), inputs()
    before = result(attn, *tensors)
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[:, :, 90:] = -3 * x[:, :, 90:].flip(2)
    close(result(attn, *changed)[:, :, :90], before[:, :, :90])


def mask_honoured(cls: Any) -> None:
    """A key that a given mask hides carries no weight; a row without keys gives 0."""
    attn, (q, k, v) = small(cls), inputs()
    hidden = torch.zeros(LENGTH, dtype=torch.bool)
    hidden[::3] = True
    visible = (~hidden).repeat(LENGTH, 1)
    visible[0] = False
    before = _whole_or_last(attn, q, k, v, ops.dense(visible))
    v = v.clone()
    v[:, :, hidden] += 100
    close(_whole_or_last(attn, q, k, v, ops.dense(visible)), before)
    if not torch.isfinite(before).all():
        raise Fault("a row gives NaN or infinity")
    if before.shape[2] > 1 and before[:, :, 0].abs().max() > 0:
        raise Fault("the first row sees no key but gives something other than 0")


def softcap(cls: Any) -> None:
    """A cap on the logits is honoured."""
    attn = covering(cls) if cls.card.full else small(cls)
    q, k, v = inputs()
    got = _whole_or_last(attn, q, k, v, softcap=2.0)
    dense = ops.attend(q, k, v, causal=directed(cls), softcap=2.0)
    close(got, dense[:, :, -got.shape[2] :])


def _whole_or_last(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, mask: ops.Mask | None = None, **options: Any
) -> Tensor:
    """A whole prefill where the mechanism acts in prefill, else its last query decoded."""
    if "prefill" in attn.card.phases:
        return prefilled(attn, q, k, v, mask, **options)
    return prefilled(attn, q[:, :, -1:], k, v, mask, phase="decode", **options)


def gradients(cls: Any) -> None:
    """Gradients are those of the plain reference."""
    needs(cls, "prefill")
    attn, grads = small(cls), []
    for name in ("torch", "reference"):
        tensors = [x.double().requires_grad_() for x in inputs()]
        with ops.backend(name):
            out = result(attn, *tensors)
            grads.append(torch.autograd.grad(out.square().sum(), tensors))
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs, 1e-8)


def bfloat16(cls: Any) -> None:
    """bfloat16 inputs give what the same numbers give in float32, to their precision."""
    attn, tensors = small(cls), inputs(dtype=torch.bfloat16)
    got = result(attn, *tensors)
    if got.dtype != torch.bfloat16:
        raise Fault(f"gives {got.dtype} for bfloat16")
    close(got, result(attn, *(x.float() for x in tensors)), 0.03)


def determinism(cls: Any) -> None:
    """Two calls give bitwise the same."""
    attn, tensors = small(cls), inputs()
    if not torch.equal(result(attn, *tensors), result(attn, *tensors)):
        raise Fault("two calls differ")


PROPERTIES: dict[str, Check] = {
    "acts": acts,
    "fast path = reference": fast_path,
    "full budget = dense": full_budget,
    "decode = prefill": decode_is_prefill,
    "grouped heads": grouped_heads,
    "left padding": left_padding,
    "right padding": right_padding,
    "batch": batch,
    "no look-ahead": no_look_ahead,
    "choice without look-ahead": choice_without_look_ahead,
    "mask honoured": mask_honoured,
    "softcap": softcap,
    "gradients": gradients,
    "bfloat16": bfloat16,
    "determinism": determinism,
    "configuration": survives_copying,
}
