"""Linear attention: over all keys at once, or over those of every prefix. No L×L tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.checks import check_floating, check_shape
from foveate.ops.scan import scan
from foveate.ops.shapes import check_qkv


def linear_attention_global(
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    key_weight: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Attention with weights w_j fq_i·fk_j, divided by their sum over keys + eps if `normalize`.

    Features fq (B, Hq, Lq, F), fk (B, Hkv, Lk, F), v (B, Hkv, Lk, Dv), key_weight (B, Hkv, Lk) or
    None for ones (0 at padding) -> (B, Hq, Lq, Dv) in fq's type. Normalising is meant for features
    >= 0. Raises ValueError or TypeError for what does not fit together.
    """
    shape = check_qkv(fq, fk, v)
    wide = torch.promote_types(fq.dtype, torch.float32)
    keys, values = fk.to(wide), v.to(wide)
    if key_weight is not None:
        check_floating(fq=fq, key_weight=key_weight)
        check_shape("key_weight", key_weight, (shape.batch, shape.kv_heads, shape.k_len))
        keys = keys * key_weight[..., None]
    rows = fq.to(wide).reshape(shape.batch, shape.kv_heads, -1, shape.dim)
    out = rows @ (keys.mT @ values)
    if normalize:
        out = out / (rows @ keys.sum(2)[..., None] + eps)
    return out.view(*fq.shape[:3], shape.v_dim).to(fq.dtype)


def linear_attention_causal(
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    *,
    state: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Linear attention of every token to those up to it: weights fq_i·fk_j for j <= i.

    Features fq (B, Hq, T, F), fk (B, Hkv, T, F), v (B, Hkv, T, Dv); state of the tokens before
    (s (B, Hkv, F, Dv), z (B, Hkv, F)) or None -> (B, Hq, T, Dv) in fq's type, state in float32.
    Tokens outside of `valid` (B, T) bool write nothing and give 0. Raises ValueError or TypeError
    for what does not fit together.
    """
    s, z = (None, None) if state is None else state
    out, last = scan(fq, fk, v, scale=1.0, state=s, valid=valid)
    keys = fk.to(last.dtype)
    if valid is not None:
        keys = keys.masked_fill(~valid[:, None, :, None], 0.0)
    if z is None:
        z = keys.new_zeros(*keys.shape[:2], keys.shape[3])
    check_shape("state z", z, (*keys.shape[:2], keys.shape[3]))
    if not normalize:
        return out, (last, z + keys.sum(2))
    sums = keys.cumsum(2) + z[:, :, None]
    rows = fq.to(last.dtype).unflatten(1, (fk.shape[1], -1))
    mass = (rows * sums[:, :, None]).sum(-1).flatten(1, 2)[..., None]
    return (out / (mass + eps)).to(fq.dtype), (last, sums[:, :, -1] if sums.shape[2] else z)
