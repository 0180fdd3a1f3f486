"""The three attention primitives: they check, choose the backend, and call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from foveate.ops import reference
from foveate.ops.attend import attend_torch
from foveate.ops.backend import current
from foveate.ops.block_sparse import Tiles, block_sparse_at_once, check_layout, few_pairs
from foveate.ops.gather import check_indices, gather_native, gather_torch
from foveate.ops.layout import BlockLayout
from foveate.ops.mask import Mask
from foveate.ops.normalizers import Normalizer, Softmax, normalizer_of
from foveate.ops.prefill import attend_native, block_sparse_native
from foveate.ops.routed import routed_torch
from foveate.ops.shapes import Shape, check_causal, check_qkv
from foveate.ops.skip import Skip, check_skip, skipped
from foveate.ops.tile import check_bias

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Common(TypedDict, total=False):
        scale: float | None
        bias: Tensor | None
        softcap: float | None

    class _Masked(_Common, total=False):
        mask: Mask | None
        causal: bool
        q_pos: Tensor | None
        k_pos: Tensor | None

    class _Sparse(_Masked, total=False):
        skip: Skip | tuple[float, int] | None

    class _Dense(_Masked, total=False):
        normalizer: str | Normalizer

    class _Gather(_Common, total=False):
        width: int


def _check_options(
    shape: Shape,
    softcap: float | None,
    mask: Mask | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
) -> None:
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a foveate Mask (wrap a bool tensor in Mask factory dense()), "
            f"got {type(mask).__name__}"
        )
    want = (shape.batch, shape.q_heads)
    if mask is not None and (mask.batch not in (1, want[0]) or mask.heads not in (1, want[1])):
        raise ValueError(
            f"mask {mask} is for (batch, heads) {(mask.batch, mask.heads)}; "
            f"wanted batch 1 or {want[0]} and heads 1 or {want[1]}"
        )
    for name, pos in (("q_pos", q_pos), ("k_pos", k_pos)):
        if pos is not None and (pos.is_floating_point() or pos.dtype == torch.bool):
            raise TypeError(f"{name} must be an integer tensor, got {pos.dtype}")
        if pos is not None and pos.dim() == 2 and pos.shape[0] not in (1, shape.batch):
            raise ValueError(f"{name} has batch {pos.shape[0]}; wanted 1 or {shape.batch}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}")


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[_Dense]
) -> tuple[Tensor, Tensor]: ...
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[_Dense]
) -> Tensor: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    normalizer: str | Normalizer = "softmax",
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Dense attention, streamed over key blocks: never an Lq×Lk tensor in memory.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) -> out (B, Hq, Lq, Dv), and with
    `return_lse` the natural log-sum-exp of the logits (B, Hq, Lq), softmax only, in float32
    (float64 for float64 input).
    `mask` and `causal` are joined; `bias` broadcasts to (B, Hq, Lq, Lk) and is differentiable;
    `softcap` bounds logits by c·tanh(s/c); scale defaults to 1/sqrt(D). Positions (L,) or (B, L)
    default to the last Lq of Lk. Raises ValueError or TypeError for what does not fit together.
    """
    shape = check_qkv(q, k, v)
    check_causal(shape.q_len, shape.k_len, causal and q_pos is None)
    _check_options(shape, softcap, mask, q_pos, k_pos)
    rule = normalizer_of(normalizer)
    if isinstance(rule, Softmax) and bias is None and k_pos is None:
        served = attend_native(
            q, k, v, mask=mask, is_causal=causal, scale=scale, softcap=softcap, q_pos=q_pos
        )
        if served is not None:
            return served if return_lse else served[0]
    run = reference.attend_reference if current() == "reference" else attend_torch
    out, lse = run(
        q,
        k,
        v,
        mask=mask,
        is_causal=causal,
        scale=scale,
        bias=check_bias(bias, shape),
        softcap=softcap,
        normalizer=rule,
        q_pos=q_pos,
        k_pos=k_pos,
        return_lse=return_lse,
    )
    return (out, lse) if return_lse else out


@overload
def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Sparse],
) -> tuple[Tensor, Tensor]: ...
@overload
def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[_Sparse],
) -> Tensor: ...
def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    mask: Mask | None = None,
    causal: bool = True,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    skip: Skip | tuple[float, int] | None = None,
    return_lse: bool = False,
) -> Any:
    """Exact softmax attention over the key blocks a layout chose; memory O(L·D + blocks).

    Shapes and options as in `attend`; `layout` lists key blocks per query block, one list per
    query head, per kv head or for all. `mask` and `causal` apply inside the blocks; the layout's
    own `partial`, if it has one, says where they can matter and must then fit them. `skip`
    (threshold, rows) also leaves out blocks that turn out not to matter: see `Skip`.
    """
    shape = check_qkv(q, k, v)
    check_causal(shape.q_len, shape.k_len, causal and q_pos is None)
    check_layout(layout, shape)
    _check_options(shape, softcap, mask, q_pos, k_pos)
    options: dict[str, Any] = {"mask": mask, "is_causal": causal, "scale": scale}
    options["softcap"] = softcap
    at: dict[str, Any] = {"bias": check_bias(bias, shape), "q_pos": q_pos, "k_pos": k_pos}
    rule = check_skip(skip, layout)
    plain = all(x is None for x in at.values())
    if shape.q_len == 1 and plain and mask is None and rule is None:
        # The last query sees every key: its list can be gathered as it is.
        idx, listed = layout.indices, layout.filled
        found = gather(
            *(q, k, v, idx, listed),
            width=layout.block[1],
            scale=scale,
            softcap=softcap,
            return_lse=True,
        )
        return found if return_lse else found[0]
    if bias is None and k_pos is None:
        served = block_sparse_native(q, k, v, layout, **options, q_pos=q_pos, skip=rule)
        if served is not None:
            return served if return_lse else served[0]
    if current() == "reference":
        out, lse = reference.block_sparse_reference(q, k, v, layout, **options, **at, skip=rule)
        return (out, lse) if return_lse else out
    if rule is not None:
        layout = skipped(Tiles(q, k, v, layout, **options, **at), rule)
    if plain and few_pairs(shape):
        out, lse = block_sparse_at_once(q, k, v, layout, **options)
    elif layout.block[0] == 1 < shape.q_len and plain:
        out, lse = routed_torch(q, k, v, layout, **options)
    else:
        out, lse = Tiles(q, k, v, layout, **options, **at).run()
    return (out, lse) if return_lse else out


@overload
def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    valid: Tensor | None = ...,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Gather],
) -> tuple[Tensor, Tensor]: ...
@overload
def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    valid: Tensor | None = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[_Gather],
) -> Tensor: ...
def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    valid: Tensor | None = None,
    *,
    width: int = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Exact softmax attention of every query over its own list of tokens.

    idx (B|1, 1|Hkv|Hq, Lq|1, m) lists tokens (width 1) or blocks of `width` tokens; one list
    serves all queries where its axis is 1. `valid` (like idx, bool) marks entries that count. A
    token listed twice counts twice: lists must be free of repeats. Other options as in `attend`.
    """
    shape = check_qkv(q, k, v)
    check_indices(idx, valid, shape, width)
    _check_options(shape, softcap)
    if bias is None:
        options: dict[str, Any] = {"width": width, "scale": scale, "softcap": softcap}
        served = gather_native(q, k, v, idx, valid, **options)
        if served is not None:
            return served if return_lse else served[0]
    run = reference.gather_reference if current() == "reference" else gather_torch
    out, lse = run(
        q,
        k,
        v,
        idx,
        valid,
        width=width,
        scale=scale,
        bias=check_bias(bias, shape),
        softcap=softcap,
    )
    return (out, lse) if return_lse else out
