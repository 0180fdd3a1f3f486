"""The one softmax kernel under `attend`, `block_sparse` and `gather`: dense tiles, with lse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from foveate.ops.shapes import Shape

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def default_scale(scale: float | None, dim: int) -> float:
    """The softmax scale: 1/sqrt(dim) unless given."""
    return dim**-0.5 if scale is None else float(scale)


def needs_grad(*tensors: Tensor | None) -> bool:
    """True when autograd must be able to go back through one of the tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def has_flash(q: Tensor, v: Tensor, softcap: float | None, *others: Tensor | None) -> bool:
    """Whether PyTorch's own CPU kernel, which also returns lse, can serve this call."""
    plain = softcap is None and q.shape[-1] == v.shape[-1] and v.shape[-2] > 0 and q.numel() > 0
    return plain and q.device.type == "cpu" and not needs_grad(q, v, *others)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's CPU kernel on 4-D tensors, grouped heads read in place: out and lse."""
    if bias is not None:
        bias = bias.to(torch.promote_types(q.dtype, torch.float32))
    if scale < 0:  # the kernel takes the maximum of a row before it scales
        q, scale = -q, -scale
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = _flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    return out, lse


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Soft-capped logits, softcap * tanh(logits / softcap)."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def grouped_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled logits in at least float32: q (B, Hq, Lq, D), k (B, Hkv, Lk, D) -> (B, Hq, Lq, Lk).

    Keys are read once per group, never repeated.
    """
    b, hq, lq, d = q.shape
    hkv = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    folded = q.to(wide).reshape(b, hkv, hq // hkv * lq, d) * scale
    return (folded @ k.to(wide).transpose(-1, -2)).view(b, hq, lq, k.shape[2])


def grouped_values(weights: Tensor, v: Tensor) -> Tensor:
    """Weighted sums of values: weights (B, Hq, Lq, Lk), v (B, Hkv, Lk, Dv) -> (B, Hq, Lq, Dv)."""
    b, hq, lq, lk = weights.shape
    hkv = v.shape[1]
    folded = weights.reshape(b, hkv, hq // hkv * lq, lk)
    return (folded @ v.to(weights.dtype)).view(b, hq, lq, v.shape[3])


def softmax_tile(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one tile written out; rows whose keys are all -inf give 0 and -inf."""
    logits = cap(grouped_logits(q, k, scale), softcap)
    if bias is not None:
        logits = logits + bias
    top = logits.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = grouped_values(weights / total.masked_fill(empty, 1), v)
    lse = (top + total.masked_fill(empty, 1).log()).masked_fill(empty, -math.inf)
    return out.to(q.dtype), lse.squeeze(-1)


def attend_tile(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one tile: q (N, Hq, R, D), k, v (N, Hkv, M, ·), additive bias or None.

    Returns out and lse. Under autograd the weights are kept: callers with many tiles wrap the
    call, and the gathering before it, in `recomputed`.
    """
    if k.shape[2] == 0:
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    if has_flash(q, v, softcap, k, bias):
        if bias is None:
            return flash(q, k, v, scale)
        bias = bias.expand(*q.shape[:3], k.shape[2])
        out, lse = flash(q, k, v, scale, bias=bias)
        # For a row without keys the kernel reports lse 0 (and out 0); 0 is rare among true ones.
        suspect = (lse == 0).nonzero(as_tuple=True)
        lse[suspect] = lse[suspect].masked_fill(torch.isinf(bias[suspect]).all(-1), -math.inf)
        return out, lse
    return softmax_tile(q, k, v, bias, scale, softcap)


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of tensors; under autograd keep only its inputs and recompute it backward."""
    if not needs_grad(*(x for x in args if isinstance(x, Tensor))):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def check_bias(bias: Tensor | None, shape: Shape) -> Tensor | None:
    """An additive bias that broadcasts to (B, Hq, Lq, Lk), as a 4-D tensor."""
    if bias is None:
        return None
    want = (shape.batch, shape.q_heads, shape.q_len, shape.k_len)
    fits = bias.dim() == 4 and all(a in (1, b) for a, b in zip(bias.shape, want, strict=True))
    if not fits or not bias.is_floating_point():
        raise ValueError(
            f"bias must be floating and broadcast to {want} with 4 axes, "
            f"got {bias.dtype} {tuple(bias.shape)}"
        )
    return bias
