"""`attach`: run any mechanism inside a transformers model, and put the model back afterwards."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from foveate.attention.base import Attention, Call, Memory, Record, Tables
from foveate.cache.base import CachePolicy, Codec, Eviction
from foveate.hf.adopt import adopt, announce, rotary_tables
from foveate.hf.codec import CodecLayer
from foveate.hf.eviction import EvictionLayer
from foveate.hf.layers import PolicyLayer
from foveate.hf.masks import is_causal, layer_mask, refuse, understand
from foveate.hf.plan import attention_plan, cache_plan
from foveate.hf.planfile import Plan, load_plan
from foveate.hf.tails import Prefix, TailLayer, follow
from foveate.registry import create

_NAME = "foveate"
_attached: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


def attach(
    model: Any,
    *,
    prefill: Any = None,
    decode: Any = None,
    cache: Any = None,
    plan: Any = None,
    prefix: Any = None,
) -> Attachment:
    """Run mechanisms inside a transformers decoder; use as a context manager or call `detach`.

    Each slot takes a mechanism, a name, a `name:key=value,…` string, a list with one entry per
    layer (an entry may be a list with one per kv head) or a dict {layer: entry}; None is dense
    attention and a full cache. `plan`, a file that `foveate tune` wrote, fills the slot prefill.
    With `prefix`, made by `foveate.prefix`, every sequence follows that text: its tokens and
    positions count from the end of it, and its cache holds only what comes after.
    Layers with a sliding window of the model's own keep it: no slot
    acts on them. Raises TypeError for what is no suitable mechanism or model and
    RuntimeError when the model is already attached. On exit the model is exactly as before.
    """
    if plan is not None:
        if prefill is not None:
            raise ValueError("a plan fills the slot prefill: give the one or the other")
        made = plan if isinstance(plan, Plan) else load_plan(plan)
        made.fit(model, "the plan" if made is plan else str(plan))
        prefill = made.prefill
    if prefix is not None and not isinstance(prefix, Prefix):
        raise TypeError(
            f"prefix takes what foveate.prefix made of a text, got {type(prefix).__name__}"
        )
    return Attachment(model, prefill, decode, cache, prefix)


class Attachment:
    """A model with mechanisms in its slots; `record`, if set, is told what every call did."""

    def __init__(
        self, model: Any, prefill: Any, decode: Any, cache: Any, prefix: Prefix | None
    ) -> None:
        self.decoder = _decoder_of(model)
        config = self.decoder.config
        self.layers = int(config.num_hidden_layers)
        self.prefill = attention_plan("prefill", prefill, self.layers)
        self.decode = attention_plan("decode", decode, self.layers)
        self.policies = cache_plan(cache, self.layers)
        _check_slots(self.decode, self.policies)
        # Dense attention to a shared prefix and what follows it goes by the name of relay.
        self.dense: Attention = create("dense" if prefix is None else "relay")
        self.prefix = prefix
        if prefix is not None:
            prefix.check(self.decoder, [*self.prefill, *self.decode], self.policies)
        self.rope = [self._tables(index) for index in range(self.layers)]
        self.record: Callable[[Record], None] | None = None
        self._cache: Any = None
        self._memory = Memory()
        # Positions of the keys of the running call, the same for all its layers, by their number.
        self._located: dict[int, Tensor | None] = {}
        self._turns: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._config = config
        self._before = config._attn_implementation_internal
        self._hooks = [self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True)]
        self._hooks.append(self.decoder.register_forward_hook(self._leave, always_call=True))
        if any(isinstance(p, Codec) for p in self.policies):
            for index, block in enumerate(_blocks_of(self.decoder, self.layers)):
                hook = _watch(self, index)
                self._hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, layer_mask)
        config._attn_implementation_internal = _NAME
        _attached.update(dict.fromkeys(self.decoder.modules(), self))

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Put the model back as it was; harmless when done twice."""
        if self._hooks:
            self._config._attn_implementation_internal = self._before
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            for module in self.decoder.modules():
                _attached.pop(module, None)

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the decoder runs: give the cache our layers, and make one if it would."""
        names = inspect.signature(type(module).forward).parameters
        kwargs = dict(zip(list(names)[1:], args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        wanted = kwargs.get("use_cache")
        wanted = getattr(self._config, "use_cache", False) if wanted is None else wanted
        checkpointing = module.training and getattr(module, "gradient_checkpointing", False)
        if cache is None and wanted and not checkpointing:
            cache = kwargs["past_key_values"] = DynamicCache(config=self._config)
        self._cache, self._memory, self._located, self._turns = cache, Memory(), {}, {}
        if cache is not None:
            self._memory = adopt(cache, self.policies, self.decoder)
            follow(cache, self.prefix)
            announce(cache, kwargs)
        if self.prefix is not None:
            kwargs["position_ids"] = self.prefix.moved(kwargs, cache)
        return (), kwargs

    def _leave(self, *_: Any) -> None:
        """After the decoder ran: forget the call, rotary tables included."""
        for layer in getattr(self._cache, "layers", []):
            if isinstance(layer, CodecLayer | TailLayer):
                layer.forget()
        self._cache, self._memory = None, Memory()

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Any,
        scale: float | None,
        options: dict[str, Any],
    ) -> Tensor:
        """One layer's attention: q (B, Hq, Lq, D), k, v (B, Hkv, Lk, ·) -> (B, Hq, Lq, Dv)."""
        index = int(getattr(module, "layer_idx", 0) or 0)
        layers = getattr(self._cache, "layers", [])
        layer = layers[index] if index < len(layers) else None
        q_len, k_len = q.shape[2], k.shape[2]
        seen = understand(attention_mask, is_causal(module, options), q_len)
        if isinstance(layer, PolicyLayer):
            if seen.rule is not None and (layer.reads or isinstance(layer, EvictionLayer)):
                raise ValueError(
                    f"cache={layer.policy.card.name} needs plain causal attention, but this call "
                    "comes with a mask of its own (packed documents, prefixes or a 4-D mask)"
                )
            valid = layer.admit(seen.valid(q_len), q.shape[0], q_len)
        else:
            valid = seen.valid(k_len)
        past = layer is not None and layer.get_seq_length() > q_len
        call = Call(
            layer=index,
            layers=self.layers,
            phase="decode" if q_len == 1 and past else "prefill",
            valid=valid,
            softcap=options.get("softcap"),
            memory=self._memory,
            record=self.record,
            shared=None if self.prefix is None else self.prefix.layers[index],
        )
        if index < self.layers and not isinstance(layer, EvictionLayer):
            call.rope = self.rope[index]
            if valid is not None or k_len not in self._located:
                ids = options.get("position_ids")
                self._located[k_len] = _positions(ids, valid, q_len, k_len)
            call.positions = self._located[k_len]
        mechanism = self._mechanism(call.phase, index, seen.sliding)
        if mechanism is self.dense:
            call.record = None
        if isinstance(layer, PolicyLayer) and layer.reads and past:
            out = layer.attend(q, scale=scale, softcap=call.softcap)
        else:
            out = mechanism(q, k, v, causal=seen.causal, mask=seen.rule, scale=scale, call=call)
        if isinstance(layer, PolicyLayer):
            layer.finish(q, scale=scale, record=self.record, at=index)
        follower = self._mechanism("decode", index, seen.sliding)
        if call.phase == "prefill" and follower.stateful and layer is not None:
            if isinstance(layer, EvictionLayer):
                k, call.valid = layer.view()
            follower.after_prefill(_last_queries(q, valid), k, call)
        return out

    def _tables(self, index: int) -> Tables | None:
        """Rotary tables of a layer; those of single positions are made once for a running call."""
        found = rotary_tables(self.decoder, index)
        kinds = getattr(self.decoder.config, "layer_types", None)
        kind = kinds[index] if kinds else ""

        def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
            if positions.numel() > 1:
                return found(positions)  # type: ignore[misc]
            key = (kind, int(positions))
            if key not in self._turns:
                self._turns[key] = found(positions)  # type: ignore[misc]
            return self._turns[key]

        return None if found is None else tables

    def _mechanism(self, phase: str, index: int, sliding: bool) -> Attention:
        """Who attends in a layer."""
        plan = self.prefill if phase == "prefill" else self.decode
        chosen = plan[index] if index < self.layers else None
        return self.dense if chosen is None or sliding else chosen


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
    attachment = _attached.get(module)
    if attachment is None:
        raise RuntimeError(
            "this model shares its config object with an attached model: detach that one first, "
            "or build the models from separate configs"
        )
    refuse(dropout, options)
    out = attachment.attend(module, query, key, value, attention_mask, scaling, options)
    return out.transpose(1, 2).contiguous(), None


def is_attached(module: nn.Module) -> bool:
    """Whether a module, or one inside it, belongs to an attached model."""
    return any(part in _attached for part in module.modules())


def _positions(ids: Tensor | None, valid: Tensor | None, q_len: int, k_len: int) -> Tensor | None:
    """Positions (B|1, Lk) of keys that lie in consecutive slots, from those of the queries."""
    if ids is None or ids.dim() != 2:
        return None
    last = _last_real(valid, q_len, ids)
    first = ids.expand(len(last), -1).gather(1, last[:, None]) - last[:, None]
    return first + torch.arange(q_len - k_len, q_len, device=ids.device)


def _last_queries(q: Tensor, valid: Tensor | None) -> Tensor:
    """The last real query (B, Hq, 1, D) of every row."""
    if valid is None:
        return q[:, :, -1:]
    last = _last_real(valid, q.shape[2], q)
    return q.gather(2, last.view(-1, 1, 1, 1).expand(-1, q.shape[1], 1, q.shape[3]))


def _last_real(valid: Tensor | None, q_len: int, like: Tensor) -> Tensor:
    """Index (B,) among the queries of the last real one of every row of `like`."""
    if valid is None:
        return torch.full((like.shape[0],), q_len - 1, device=like.device)
    slots = torch.arange(q_len, device=like.device)
    return torch.where(valid[:, -q_len:], slots, 0).amax(1)


def _decoder_of(model: Any) -> Any:
    """The decoder inside a model; TypeError or RuntimeError when attach cannot serve it."""
    config, get_decoder = getattr(model, "config", None), getattr(model, "get_decoder", None)
    if config is None or get_decoder is None:
        raise TypeError(f"attach needs a transformers model, got {type(model).__name__}")
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"{name} is an encoder-decoder model: attach serves decoders only")
    decoder = get_decoder()
    if not getattr(decoder, "_supports_attention_backend", False):
        raise TypeError(
            f"{name} does not go through transformers' attention interface: its attention cannot "
            "be exchanged from outside"
        )
    if decoder.config._attn_implementation_internal == "foveate_watch":
        raise RuntimeError(f"{name} is under watch: leave that block first")
    if is_attached(decoder):
        raise RuntimeError(f"{name} is already attached: leave that block or call detach() first")
    return decoder


def _check_slots(decode: list[Attention | None], policies: list[CachePolicy | None]) -> None:
    """Refuse decode mechanisms over slots that move, or that only the cache layer can read."""
    for index, (mechanism, policy) in enumerate(zip(decode, policies, strict=True)):
        plain = mechanism is None or mechanism.card.name == "dense"
        if not plain and policy is not None and policy.read_densely:
            raise ValueError(
                f"layer {index}: what cache={policy.card.name} holds is read by dense attention "
                "only: leave the slot decode empty"
            )
        moving = isinstance(policy, Eviction) and policy.evicts_decoding
        if mechanism is not None and mechanism.stateful and policy is not None and moving:
            raise ValueError(
                f"layer {index}: decode={mechanism.card.name} keeps lists of cache slots, but "
                f"cache={policy.card.name} moves slots at every step; choose another pair"
            )


def _blocks_of(decoder: nn.Module, layers: int) -> nn.ModuleList:
    """The list of decoder layers."""
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == layers:
            return child
    raise TypeError(f"{type(decoder).__name__} has no list of {layers} layers to watch")


def _watch(attachment: Attachment, index: int) -> Callable[..., None]:
    """A hook that shows a codec layer the input of its decoder layer."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        layers = getattr(attachment._cache, "layers", [])
        if index < len(layers) and isinstance(layers[index], CodecLayer):
            layers[index].hidden = args[0] if args else kwargs.get("hidden_states")

    return hook
