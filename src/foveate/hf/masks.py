"""The mask a transformers model hands to its layers, kept as a rule instead of an L×L tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from foveate import ops
from foveate.ops import Mask

# Arguments of attention functions that change the result and that nothing here understands.
_FOREIGN = ("s_aux", "position_bias")


@dataclass(frozen=True)
class LayerMask:
    """What a layer may see: causality, a further rule, and which tokens are padding.

    padding (B, tokens so far) bool, True = real, None when nothing is padded. The rule's positions
    count from the first key of the layer that the mask was made for. `sliding` marks a layer that
    the model itself gives a sliding window.
    """

    causal: bool
    rule: Mask | None
    padding: Tensor | None
    sliding: bool = False

    def contiguous(self) -> LayerMask:
        """Itself: generation calls this on what a mask function returns."""
        return self

    def valid(self, keys: int) -> Tensor | None:
        """Validity (B, keys) of the last `keys` tokens, None when all are real."""
        if self.padding is None:
            return None
        if self.padding.shape[1] < keys:
            raise ValueError(
                f"the attention mask covers {self.padding.shape[1]} tokens, but a layer holds "
                f"{keys}: it must cover the cached tokens and the new ones"
            )
        valid = self.padding[:, -keys:]
        return None if bool(valid.all()) else valid


def layer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> LayerMask:
    """The mask function registered with transformers; arguments as of its `sdpa_mask`."""
    padding = None
    if attention_mask is not None and not bool(attention_mask.all()):
        padding = attention_mask.bool()
    if mask_function is causal_mask_function:
        return LayerMask(True, None, padding)
    if mask_function is bidirectional_mask_function:
        return LayerMask(False, None, padding)
    if use_vmap:  # a caller's own function, which need not broadcast
        seen = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            allow_is_causal_skip=False,
            use_vmap=True,
            device=device,
        )
        return LayerMask(False, ops.dense(seen), padding)
    if local_size is not None:
        window = ops.window(local_size)
        if _agree(mask_function, window & ops.causal(), q_offset, q_length):
            return LayerMask(True, window, padding, sliding=True)

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen: Tensor = mask_function(b, h, q + kv_offset, k + kv_offset)
        return seen

    return LayerMask(False, Mask(predicate, batch=batch_size, name="model mask"), padding)


def _agree(function: Callable[..., Any], rule: Mask, q_offset: int, q_length: int) -> bool:
    """Whether a mask function shows the last and the first rows the same keys as a known rule."""
    end = q_offset + q_length
    rows = torch.tensor(sorted({q_offset, *range(max(end - 3, 0), end)}))[:, None]
    keys = torch.arange(end)[None]
    at = torch.zeros((), dtype=torch.long)
    theirs = torch.broadcast_to(function(at, at, rows, keys), (rows.shape[0], end))
    return torch.equal(theirs, rule(at, at, rows, keys))


def is_causal(module: Any, options: Mapping[str, Any]) -> bool:
    """Whether a layer's call is causal: its options say, or else the module."""
    said = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def understand(attention_mask: Any, causal: bool, q_len: int) -> LayerMask:
    """The mask a layer was handed: ours, a 4-D tensor of the caller's, or nothing."""
    if isinstance(attention_mask, LayerMask):
        return attention_mask
    if attention_mask is None:
        return LayerMask(causal, None, None)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        raise ValueError(
            "attach understands 2-D padding masks and 4-D masks of visible pairs, got "
            f"{type(attention_mask).__name__} {tuple(getattr(attention_mask, 'shape', ()))}"
        )
    seen = attention_mask
    if seen.dtype != torch.bool:
        hidden = seen <= -1e4
        if not bool((hidden | (seen == 0)).all()):
            raise ValueError(
                "a 4-D attention mask must be bool or hold 0 (visible) and large negative values "
                "(hidden) only: a general additive bias has no meaning for sparse attention"
            )
        seen = ~hidden
    return LayerMask(False, ops.dense(seen), None)


def plain_padding(seen: LayerMask, q_len: int, k_len: int) -> Tensor | None:
    """Which of the last q_len tokens are real, (B, q_len) or None for all, under a causal mask.

    Raises ValueError for a mask that hides anything but padding and what comes later.
    """
    if seen.rule is None:
        return None
    rule = seen.rule & ops.causal() if seen.causal else seen.rule
    shown = rule.to_dense(q_len, k_len)[:, 0]
    valid, at = shown[:, -1], torch.arange(k_len, device=shown.device)
    own = valid[:, k_len - q_len :]
    want = valid[:, None] & (at <= at[k_len - q_len :, None])
    if not bool(((shown == want) | ~own[..., None]).all()):
        raise ValueError(
            "a linear layer needs plain causal attention, but this call comes with a mask of its "
            "own (a sliding window, packed documents or a 4-D mask)"
        )
    return own


def refuse(dropout: float, options: Mapping[str, Any]) -> None:
    """ValueError for what a model asks of its attention and would not get."""
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported here: call model.eval() or set "
            "attention_dropout to 0"
        )
    for name in _FOREIGN:
        if options.get(name) is not None:
            raise ValueError(f"this model's attention takes {name}, which is not supported")
