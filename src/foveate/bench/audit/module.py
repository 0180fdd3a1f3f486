"""What every mechanism of kind "module" owes, checked on small random tensors."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.bench.audit import Check, Fault, Unfit, close
from foveate.nn._planar import Planar
from foveate.registry import create

LENGTH, BATCH, CUT = 37, 2, 22
# Sides of the maps that layers on images take.
SIDE = 6


def small(cls: Any, **options: Any) -> Any:
    """The layer with its options for the audit, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = create(cls.card.name, **{**cls.card.small, **options})
    return made.eval()


def tokens(cls: Any, seed: int = 0) -> Tensor:
    """Random x (2, 37, dim), or (2, dim, 6, 6) for a layer on maps."""
    made = torch.Generator().manual_seed(seed)
    dim = cls.card.small["dim"]
    shape = (dim, SIDE, SIDE) if issubclass(cls, Planar) else (LENGTH, dim)
    return torch.randn(BATCH, *shape, generator=made)


def ways(cls: Any) -> list[dict[str, Any]]:
    """Arguments of `forward`, beside x, for each pattern on the card; a layer on maps has none."""
    if issubclass(cls, Planar):
        return [{}]
    out = []
    for pattern in cls.card.patterns:
        direction, source = pattern.split()
        context = {"context": tokens(cls, 1)} if source == "cross" else {}
        out.append({"causal": direction == "causal", **context})
    return out


def changed(x: Tensor, late: slice | Tensor) -> Tensor:
    """x with other tokens at some places."""
    x = x.clone()
    x[:, late] = -7 * x[:, late].flip(1)
    return x


@torch.no_grad()
def shapes(cls: Any) -> None:
    """It gives tokens like those it takes, finite ones, in every pattern on its card."""
    layer, x = small(cls), tokens(cls)
    for way in ways(cls):
        y = layer(x, **way)
        if y.shape != x.shape or not torch.isfinite(y).all():
            raise Fault(f"gives {tuple(y.shape)} for {tuple(x.shape)}, or no finite numbers")


@torch.no_grad()
def no_look_ahead(cls: Any) -> None:
    """Where it is causal, later tokens change nothing before them."""
    layer, x = small(cls), tokens(cls)
    causal = [way for way in ways(cls) if way.get("causal")]
    if not causal:
        raise Unfit("attends to both sides: later tokens are meant to be seen")
    for way in causal:
        later = {key: changed(y, slice(CUT, None)) for key, y in way.items() if key == "context"}
        got = layer(changed(x, slice(CUT, None)), **{**way, **later})
        close(got[:, :CUT], layer(x, **way)[:, :CUT])


@torch.no_grad()
def mask_honoured(cls: Any) -> None:
    """Tokens that a mask hides change nothing elsewhere."""
    if issubclass(cls, Planar):
        raise Unfit("takes whole maps, which have no padding")
    layer, x = small(cls), tokens(cls)
    hidden = torch.arange(LENGTH) % 3 == 1
    for way in ways(cls):
        given = {**way, "mask": ops.padding(~hidden)}
        other = {key: changed(y, hidden) for key, y in way.items() if key == "context"}
        got = layer(changed(x, hidden), **{**given, **other})
        close(got[:, ~hidden], layer(x, **given)[:, ~hidden])


@torch.no_grad()
def batch(cls: Any) -> None:
    """A row does not depend on its batch mates."""
    layer, x = small(cls), tokens(cls)
    for way in ways(cls):
        together = layer(x, **way)
        for b in range(BATCH):
            row = slice(b, b + 1)
            own = {key: y[row] for key, y in way.items() if key == "context"}
            close(layer(x[row], **{**way, **own}), together[row])


@torch.no_grad()
def steps(cls: Any) -> None:
    """Token by token after a prompt gives what the whole gives."""
    if not hasattr(cls, "step"):
        raise Unfit("has no step: its card says how it decodes")
    layer, x = small(cls), tokens(cls)
    y, state = layer(x[:, :CUT], return_state=True)
    outs = [y]
    for t in range(CUT, LENGTH):
        y, state = layer.step(x[:, t], state)
        outs.append(y[:, None])
    close(torch.cat(outs, 1), layer(x))


@torch.no_grad()
def handed_over(cls: Any) -> None:
    """Handed over at any token, a state goes on as if there had been no break."""
    if not hasattr(cls, "step"):
        raise Unfit("has no step: its card says how it decodes")
    layer, x = small(cls), tokens(cls)
    want = layer(x)
    for cut in (1, 16, LENGTH - 1):
        first, state = layer(x[:, :cut], return_state=True)
        rest, _ = layer(x[:, cut:], state=state, return_state=True)
        close(torch.cat((first, rest), 1), want)


@torch.no_grad()
def padding(cls: Any) -> None:
    """A row padded on either side gives at its tokens what it gives alone, and goes on alike."""
    if issubclass(cls, Planar):
        raise Unfit("takes whole maps, which have no padding")
    layer, x, way = small(cls), tokens(cls)[:1], ways(cls)[-1]
    keeps = hasattr(cls, "step") and "causal self" in cls.card.patterns
    way = {"causal": True} if keeps else {k: v for k, v in way.items() if k != "context"}
    if f"{'causal' if way['causal'] else 'noncausal'} self" not in cls.card.patterns:
        raise Unfit("has no self-attention to pad")
    real = torch.arange(LENGTH + 5)
    for valid in (real >= 5, real < LENGTH):
        padded = torch.full((1, LENGTH + 5, x.shape[2]), 3.0)
        padded[:, valid] = x
        call = {**way, "mask": ops.padding(valid)}
        close(layer(padded, **call)[:, valid], layer(x, **way))
        if keeps and valid[-1]:
            _, after = layer(padded, **call, return_state=True)
            _, want = layer(x, return_state=True)
            more = torch.ones(1, 1, dtype=torch.bool)
            longer = ops.padding(torch.cat((valid[None], more), 1))
            got, _ = layer(x[:, :1], mask=longer, state=after, return_state=True)
            close(got, layer(x[:, :1], state=want, return_state=True)[0])


@torch.no_grad()
def state_checked(cls: Any) -> None:
    """A state of another batch is refused."""
    if not hasattr(cls, "step"):
        raise Unfit("has no step: its card says how it decodes")
    layer, x = small(cls), tokens(cls)
    _, state = layer(x, return_state=True)
    try:
        layer(x[:1], state=state, return_state=True)
    except (ValueError, RuntimeError):
        return
    raise Fault("takes a state of another batch")


def gradients(cls: Any) -> None:
    """In training gradients are finite and reach the input and every parameter."""
    layer, x = small(cls).train(), tokens(cls).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer(x, **ways(cls)[0]).square().mean().backward()
    for name, p in [("the input", x), *layer.named_parameters()]:
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.abs().sum() > 0:
            raise Fault(f"no gradient, or no finite one, reaches {name}")


@torch.no_grad()
def bfloat16(cls: Any) -> None:
    """In bfloat16 it gives bfloat16, near what the same weights give in float32."""
    layer, x = small(cls).bfloat16(), tokens(cls).bfloat16()
    got = layer(x, **_cast(ways(cls)[0], torch.bfloat16))
    if got.dtype != torch.bfloat16:
        raise Fault(f"gives {got.dtype} for bfloat16")
    want = layer.float()(x.float(), **_cast(_cast(ways(cls)[0], torch.bfloat16), torch.float32))
    off = float((got.float() - want).norm() / want.norm())
    if not off < 0.1:
        raise Fault(f"is off by {off:.1%} from float32, 10% are allowed")


def _cast(way: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {key: y.to(dtype) if isinstance(y, Tensor) else y for key, y in way.items()}


@torch.no_grad()
def copies(cls: Any) -> None:
    """Copies and pickles of it give bitwise the same."""
    layer, x, way = small(cls), tokens(cls), ways(cls)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
        if not torch.equal(other(x, **way), layer(x, **way)):
            raise Fault("a copy, or a second call, differs")


def meta_device(cls: Any) -> None:
    """It can be made without memory, on the meta device."""
    if "device" not in inspect.signature(cls).parameters:
        raise Fault("takes no device")
    layer = small(cls, device="meta")
    real = [name for name, p in layer.named_parameters() if not p.is_meta]
    if real:
        raise Fault(f"made on the meta device, it holds {', '.join(real)}")


PROPERTIES: dict[str, Check] = {
    "shapes": shapes,
    "no look-ahead": no_look_ahead,
    "mask honoured": mask_honoured,
    "batch": batch,
    "steps = forward": steps,
    "handed over": handed_over,
    "padding": padding,
    "state checked": state_checked,
    "gradients": gradients,
    "bfloat16": bfloat16,
    "copies": copies,
    "meta device": meta_device,
}
