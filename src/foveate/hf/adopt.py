"""Turning the cache of a transformers model into one of ours, in place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from foveate.attention.base import Memory, Tables
from foveate.cache.base import CachePolicy, Codec, Eviction, Store
from foveate.hf.codec import CodecLayer
from foveate.hf.eviction import EvictionLayer
from foveate.hf.layers import FullLayer, PolicyLayer, SlidingLayer, Stateful
from foveate.hf.store import StoreLayer


def adopt(cache: Any, policies: list[CachePolicy | None], decoder: Any) -> Memory:
    """Replace the stock layers of a cache by ours, keeping what they hold; returns their memory."""
    if not hasattr(cache, "layers") or hasattr(cache, "cross_attention_cache"):
        raise ValueError(f"attach works with DynamicCache, got {type(cache).__name__}")
    replicated = getattr(cache, "layer_class_to_replicate", None)
    while replicated == DynamicLayer and len(cache.layers) < len(policies):
        cache.layers.append(DynamicLayer())
    memory = Memory()
    owner = next((x for x in cache.layers if isinstance(x, CodecLayer)), None)
    for i, layer in enumerate(cache.layers):
        policy = policies[i] if i < len(policies) else None
        if isinstance(layer, PolicyLayer) and policy not in (None, layer.policy):
            raise ValueError(
                f"layer {i} of this cache was filled under {layer.policy}, but the model is "
                f"attached with {policy}: start with an empty cache"
            )
        if _gives_way(layer, policy):
            sliding = getattr(layer, "is_sliding", False)
            tables = rotary_tables(decoder, i) if _turns_keys(policy) else None
            layer = _layer_for(None if sliding else policy, layer, owner, tables)
            cache.layers[i] = layer
        if owner is None and isinstance(layer, CodecLayer):
            owner = layer
        if isinstance(layer, PolicyLayer):
            layer.await_call()
        if isinstance(layer, Stateful):
            memory[i] = layer.memory
    return memory


def announce(cache: Any, kwargs: dict[str, Any]) -> None:
    """Tell the layer that holds positions for all codec layers which ones come now."""
    owner = next((x for x in cache.layers if isinstance(x, CodecLayer)), None)
    if owner is None:
        return
    owner.locate(*positions_of(kwargs, owner.get_seq_length()))


def positions_of(kwargs: dict[str, Any], seen: int) -> tuple[Tensor, int]:
    """Positions (B|1, Lq) of a decoder call's tokens, after `seen` others, and its batch size."""
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ValueError("the decoder was called with neither input_ids nor inputs_embeds")
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]
    return positions, tokens.shape[0]


def rotary_tables(decoder: Any, index: int) -> Tables | None:
    """How the model turns positions (B, L) into rotary tables; None without rotary."""
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        return None
    extra: dict[str, Any] = {}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        extra["layer_type"] = decoder.config.layer_types[index]

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.zeros(1, dtype=torch.float32, device=positions.device)
        cos, sin = rotary(like, positions.long(), **extra)
        return cos, sin

    return tables


def _turns_keys(policy: CachePolicy | None) -> bool:
    """Whether a policy must see keys without their rotary embedding."""
    if isinstance(policy, Eviction):
        return "position" in policy.notes
    return isinstance(policy, Codec) and policy.pre_rope


def _gives_way(layer: Any, policy: CachePolicy | None) -> bool:
    """Whether a cache layer must be replaced: stock ones, and full ones when a policy comes."""
    if not isinstance(layer, Stateful):
        return isinstance(layer, CacheLayerMixin)
    return type(layer) is FullLayer and policy is not None


def _layer_for(
    policy: CachePolicy | None, old: Any, owner: CodecLayer | None, tables: Tables | None
) -> Any:
    """The layer that takes the place of `old`, a stock dynamic layer, with its tokens.

    Raises ValueError where the old layer cannot be taken over.
    """
    if type(old) is DynamicSlidingWindowLayer:
        new: Any = SlidingLayer(old.sliding_window)
    elif type(old) not in (DynamicLayer, FullLayer):
        raise ValueError(
            f"attach works with dynamic caches, got a cache layer {type(old).__name__}: leave "
            "past_key_values and cache_implementation alone, or pass a DynamicCache"
        )
    elif policy is None:
        new = FullLayer()
    elif isinstance(policy, Eviction):
        new = EvictionLayer(policy, tables)
        if old.get_seq_length():
            new.take_over(old.keys, old.values)
        new.memory = getattr(old, "memory", new.memory)
        return new
    elif isinstance(policy, Codec | Store):
        if old.get_seq_length():
            raise ValueError(
                f"{policy.card.name} encodes tokens as they come: it cannot take over a cache "
                f"that already holds {old.get_seq_length()} tokens; start with an empty one"
            )
        return (
            StoreLayer(policy) if isinstance(policy, Store) else CodecLayer(policy, owner, tables)
        )
    else:
        raise TypeError(f"{policy!r} is no cache policy")
    vars(new).update(vars(old))
    return new
