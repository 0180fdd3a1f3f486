"""Linear attention over all keys at once: two matrix products, no L×L tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.checks import check_floating, check_shape
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
