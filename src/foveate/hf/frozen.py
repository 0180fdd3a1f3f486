"""`frozen_forward`: a model as the linear operator that it is for one given text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hf.parts import Inputs, Parts, head_logits, real_tokens, run
from foveate.hf.watch import Seen, watch


class Frozen:
    """A forward pass whose weights of attention, scales of norms and gates are constants.

    Its hidden states (B, L, width) are affine in what entered it, `entering` (B, L, width), so
    that every question about relevance is a vector-Jacobian product.
    """

    def __init__(self, model: Any, entering: Tensor, hidden: Tensor) -> None:
        self._model, self.entering, self.hidden = model, entering, hidden

    def logits(self, position: int = -1) -> Tensor:
        """Logits (B, vocabulary) at a position."""
        return head_logits(self._model, self.hidden[:, position])

    def pull(self, u: Tensor, position: int = -1) -> Tensor:
        """𝒯ᵀ u (B, L, width) of directions u (B, width) in the hidden states at a position."""
        (back,) = torch.autograd.grad(
            self.hidden[:, position], self.entering, u.to(self.hidden), retain_graph=True
        )
        return back

    def contributions(self, token: Tensor, position: int = -1) -> Tensor:
        """What every input token adds to the logit of a token (B,) at a position, (B, L).

        They sum to the logit less the part of the biases.
        """
        rows: Tensor = self._model.get_output_embeddings().weight[token]
        return (self.pull(rows, position) * self.entering).sum(-1).detach()


def frozen_forward(model: Any, inputs: Inputs, *, start: int = 0) -> Frozen:
    """Run a model with everything frozen but the paths through values, from layer `start` on.

    Frozen are attention weights, the scale of every norm, and of a feed-forward part the gate, or
    the ratio of an activation to its input. Batches may be padded. Raises ValueError for inputs
    without token ids or a start out of range, TypeError for a model without the needed parts.
    """
    parts = Parts(model)
    if not 0 <= start < parts.layers:
        raise ValueError(f"start must be in [0, {parts.layers}), got {start}")
    real_tokens(inputs)
    entering: list[Tensor] = []

    def attention(seen: Seen) -> Tensor:
        return seen.attend(seen.q.detach(), seen.k.detach(), seen.v)[0]

    def block_in(layer: int, x: Tensor) -> Tensor | None:
        if layer != start:
            return None
        entering.append(x.detach().requires_grad_())
        return entering[0]

    hooks = [_replace(module, freeze) for module, freeze in _frozen_modules(parts)]
    try:
        with torch.enable_grad(), watch(model, attention=attention, block_in=block_in):
            hidden = run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return Frozen(model, entering[0], hidden)


Freeze = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _frozen_modules(parts: Parts) -> list[tuple[nn.Module, Freeze]]:
    """Norms and activations of a model, each with what takes the place of its output."""
    found: list[tuple[nn.Module, Freeze]] = [
        (m, frozen_norm) for m in parts.body.modules() if "norm" in type(m).__name__.lower()
    ]
    for layer in range(parts.layers):
        mlp = parts.mlp(layer)
        gated = any("gate" in name or "up" in name for name, _ in mlp.named_children())
        acting = [m for name, m in mlp.named_children() if "act" in name]
        if len(acting) != 1:
            raise TypeError(
                f"{parts.name}: the feed-forward part of block {layer} has {len(acting)} modules "
                "named as activations, wanted one"
            )
        found.append((acting[0], _gate if gated else _ratio))
    return found


def _replace(module: nn.Module, freeze: Freeze) -> Any:
    """Put another output in the place of a module's own."""

    def hook(module: nn.Module, args: Any, out: Any) -> Tensor:
        return freeze(module, args[0], out)

    return module.register_forward_hook(hook)


def frozen_norm(module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """A norm whose scale is a constant of the token; LayerNorm also takes away the mean."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(module, nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    eps: Any = getattr(module, "eps", None) or getattr(module, "variance_epsilon", 0.0)
    normed = wide * torch.rsqrt(wide.detach().pow(2).mean(-1, keepdim=True) + eps)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None:  # Gemma keeps the gain less one
        normed = normed * (1.0 + weight if type(module).__name__.startswith("Gemma") else weight)
    return (normed if bias is None else normed + bias).to(out.dtype)


def before_norm(norm: nn.Module, stream: Tensor, direction: Tensor) -> Tensor:
    """The direction (…, width) in a stream that one after its norm is, the norm's scale fixed."""
    at = stream.detach().requires_grad_()
    with torch.enable_grad():
        out = frozen_norm(norm, at, norm(at))
    return torch.autograd.grad(out, at, direction)[0]


def _gate(module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """A gate is a constant factor of what it gates."""
    return out.detach()


def _ratio(module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """An activation as a constant times its input; at 0 the constant is its slope there."""
    at = x.detach()
    zero = at == 0
    with torch.enable_grad():
        origin = torch.zeros((), dtype=x.dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(module.forward(origin), origin)
    ratio = torch.where(zero, slope, out.detach() / at.masked_fill(zero, 1.0))
    return x * ratio
