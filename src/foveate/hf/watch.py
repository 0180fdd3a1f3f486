"""`watch`: see, or change, what attends in a transformers model and what flows between blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from foveate import ops
from foveate.hf.masks import LayerMask, is_causal, layer_mask, refuse, understand
from foveate.hf.parts import Parts
from foveate.ops import Mask

_NAME = "foveate_watch"
_watched: weakref.WeakKeyDictionary[nn.Module, _Watched] = weakref.WeakKeyDictionary()

Attending = Callable[["Seen"], Tensor | None]
"""Told of every layer's attention; a tensor that it returns takes the place of the outputs."""
Flowing = Callable[[int, Tensor], Tensor | None]
"""Told of a layer and a stream (B, L, width); a tensor that it returns takes its place."""


class Seen:
    """One layer's attention in a running call: q (B, Hq, Lq, D), k, v (B, Hkv, Lk, ·), rotated.

    causal and mask are the model's own rule, valid (B, Lk) its real tokens (None: all). Setting
    `bias`, added to the logits, before anyone asked for outputs has an effect on them.
    """

    def __init__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rule: LayerMask,
        scale: float | None,
        softcap: float | None,
    ) -> None:
        self.layer, self.q, self.k, self.v = layer, q, k, v
        self.causal, self.valid = rule.causal, rule.valid(k.shape[2])
        self.mask = rule.rule
        self.scale, self.softcap = scale, softcap
        self.bias: Tensor | None = None
        self._done: tuple[Tensor, Tensor] | None = None
        self._unbiased: tuple[Tensor, Tensor] | None = None

    @property
    def visible(self) -> Mask | None:
        """The model's own rule and its padding, joined."""
        if self.valid is None:
            return self.mask
        padding = ops.padding(self.valid)
        return padding if self.mask is None else self.mask & padding

    def options(self) -> dict[str, Any]:
        """What the primitives need to know of it: causal, mask, scale and softcap."""
        return {
            "causal": self.causal,
            "mask": self.visible,
            "scale": self.scale,
            "softcap": self.softcap,
        }

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of other tensors under the same rule: outputs and lse."""
        return ops.attend(q, k, v, bias=self.bias, return_lse=True, **self.options())

    @property
    def out(self) -> Tensor:
        """The outputs (B, Hq, Lq, Dv), of heads before the output projection."""
        return self._attended()[0]

    @out.setter
    def out(self, value: Tensor) -> None:
        if value.shape != (*self.q.shape[:3], self.v.shape[3]):
            raise ValueError(
                f"outputs of layer {self.layer} are {(*self.q.shape[:3], self.v.shape[3])}, "
                f"got {tuple(value.shape)}"
            )
        self._done = value, self.lse

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of the logits (B, Hq, Lq)."""
        return self._attended()[1]

    @property
    def real_rows(self) -> Tensor:
        """Which queries are real tokens, (B, Lq) bool."""
        rows, q_len = self.q.shape[0], self.q.shape[2]
        if self.valid is None:
            return torch.ones(rows, q_len, dtype=torch.bool, device=self.q.device)
        return self.valid[:, -q_len:]

    def row_stats(self, u: Tensor | None = None) -> ops.RowStats:
        """Means of u (B, 1|Hkv, Lk, m) under every row's weights, entropy and lse."""
        if self._done is not None or self._unbiased is not None:
            return ops.row_stats(self.q, self.k, u, **self.options())
        # The outputs are means of the values: one pass gives both.
        width = self.v.shape[3]
        own = self.v if u is None else torch.cat((self.v, u.expand(*self.v.shape[:3], -1)), 3)
        found = ops.row_stats(self.q, self.k, own, **self.options())
        self._unbiased = found.means[..., :width].to(self.v.dtype), found.lse
        return found._replace(means=found.means[..., width:])

    def columns(self, u: Tensor | None = None) -> Tensor:
        """Transposed attention Aᵀ u (B, Hq, Lk, m) over the real rows; None: their mass."""
        lse = self.lse.masked_fill(~self.real_rows[:, None], float("-inf"))
        options = self.options() | {"mask": self.mask}
        return ops.attend_T(self.q, self.k, lse, u, valid=self.valid, **options)

    def rows(self, at: Tensor) -> Tensor:
        """Weights (B, Hq, n, Lk) of the queries of numbers `at`."""
        return ops.attention_rows(self.q, self.k, at, **self.options())

    def counts(self) -> tuple[Tensor, Tensor]:
        """Keys that every query sees (B, Hq, Lq), and real queries that see every key."""
        found = ops.visible_counts(
            self.q.shape[2],
            self.k.shape[2],
            mask=self.visible,
            causal=self.causal,
            rows=self.real_rows,
        )
        shape = (*self.q.shape[:2], -1)
        keys, queries = (x.to(self.q.device).expand(shape) for x in found)
        return keys, queries

    def _attended(self) -> tuple[Tensor, Tensor]:
        if self._done is None:
            known = self._unbiased if self.bias is None else None
            self._done = known or self.attend(self.q, self.k, self.v)
        return self._done


class _Watched:
    """A model under watch, and who watches, in the order in which they came."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.attending: list[Attending] = []
        config = parts.body.config
        if config._attn_implementation_internal == "foveate":
            raise RuntimeError(f"{parts.name} is attached: leave that block or call detach() first")
        if not getattr(parts.body, "_supports_attention_backend", False):
            raise TypeError(
                f"{type(parts.body).__name__} does not go through transformers' attention "
                "interface: its attention cannot be watched"
            )
        self._config, self._before = config, config._attn_implementation_internal
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, layer_mask)
        config._attn_implementation_internal = _NAME
        _watched.update(dict.fromkeys(parts.body.modules(), self))

    def leave(self) -> None:
        """Put the model back as it was."""
        self._config._attn_implementation_internal = self._before
        for module in self.parts.body.modules():
            _watched.pop(module, None)


@contextmanager
def watch(
    model: Any,
    *,
    attention: Attending | None = None,
    block_in: Flowing | None = None,
    attention_out: Flowing | None = None,
    mlp_out: Flowing | None = None,
    block_out: Flowing | None = None,
) -> Iterator[Parts]:
    """Run a transformers model under watch; every callback may return what takes the place.

    `attention` is told of each layer's attention, the others of the stream that enters or leaves
    a block and of what its attention (after the output projection) and its feed-forward part give.
    Watches nest, and what an outer one changed the inner ones see. Attention runs on foveate's
    kernels, so that no map is ever made. Raises TypeError for a model that lacks a part and
    RuntimeError for one that is attached. On exit the model is as before.
    """
    parts = Parts(model)
    held = _watched.get(parts.body)
    session = _Watched(parts) if held is None else held
    places: list[tuple[Flowing | None, Callable[[int], nn.Module], bool]] = [
        (block_in, parts.blocks.__getitem__, True),
        (attention_out, parts.attention, False),
        (mlp_out, parts.mlp, False),
        (block_out, parts.blocks.__getitem__, False),
    ]
    hooks = []
    try:
        for told, place, before in places:
            if told is not None:
                hooks += [_hook(place(i), partial(told, i), before) for i in range(parts.layers)]
        if attention is not None:
            session.attending.append(attention)
        yield parts
    finally:
        for hook in hooks:
            hook.remove()
        if attention is not None and attention in session.attending:
            session.attending.remove(attention)
        if held is None:
            session.leave()


def _hook(module: nn.Module, told: Callable[[Tensor], Tensor | None], before: bool) -> Any:
    """Tell a callback of the stream that enters a module, or of the one it returns."""

    def entering(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        changed = told(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return (
            ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})
        )

    def returned(_: nn.Module, args: Any, out: Any) -> Any:
        changed = told(out[0] if isinstance(out, tuple) else out)
        if changed is None:
            return None
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    if before:
        return module.register_forward_pre_hook(entering, with_kwargs=True)
    return module.register_forward_hook(returned)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers."""
    session = _watched.get(module)
    if session is None:
        raise RuntimeError(
            "this model shares its config object with a model under watch: leave that watch "
            "first, or build the models from separate configs"
        )
    refuse(dropout, options)
    rule = understand(attention_mask, is_causal(module, options), query.shape[2])
    layer = session.parts.layer_of[module]
    seen = Seen(layer, query, key, value, rule, scaling, options.get("softcap"))
    for told in session.attending:
        changed = told(seen)
        if changed is not None:
            seen.out = changed
    return seen.out.transpose(1, 2).contiguous(), None
