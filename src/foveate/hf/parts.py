"""The parts of a transformers model that measurements and edits need."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | Mapping[str, Tensor]
"""What a model reads: token ids (B, L), or what its tokenizer or processor made of a batch."""

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo")
_MLP = ("mlp", "feed_forward", "ffn")
_ATTENTION_NORM = ("input_layernorm", "ln_1", "layernorm_before")
_MLP_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
_FINAL_NORM = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "layernorm")


def body(model: Any) -> Any:
    """The model without its head: a decoder, an encoder, or a model that has no head."""
    get_decoder = getattr(model, "get_decoder", None)
    found = None if get_decoder is None else get_decoder()
    return getattr(model, "base_model", model) if found is None else found


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits (…, vocabulary) in float32 of hidden states (…, width), as the model makes them.

    Raises TypeError for a model without a language-model head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(model).__name__} has no language-model head")
    logits = head(hidden)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.float()


def run(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    """The last hidden states (B, L, width) of a pass without a cache, or without the head's work.

    With an attention mask the positions of a left-padded row count from its first real token.
    """
    given: dict[str, Any] = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    given |= options
    inner = body(model)
    taken = inspect.signature(type(inner).forward).parameters
    mask = given.get("attention_mask")
    if "position_ids" in taken and mask is not None and "position_ids" not in given:
        given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    if "use_cache" in taken:
        given["use_cache"] = False
    hidden: Tensor = inner(**given).last_hidden_state
    return hidden


def real_tokens(inputs: Inputs) -> Tensor:
    """Which tokens of a batch are no padding, (B, L) bool."""
    if isinstance(inputs, Tensor):
        return torch.ones_like(inputs, dtype=torch.bool)
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.bool()
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError(f"inputs hold no input_ids and no attention_mask, only {sorted(inputs)}")
    return torch.ones_like(ids, dtype=torch.bool)


class Parts:
    """A model in parts; raises TypeError, naming the part, where the model has none such."""

    def __init__(self, model: Any) -> None:
        self.model, self.body = model, body(model)
        config = getattr(model, "config", None)
        if config is None or not isinstance(self.body, nn.Module):
            raise TypeError(f"wanted a transformers model, got {type(model).__name__}")
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.layers = int(self.config.num_hidden_layers)
        self.heads = int(self.config.num_attention_heads)
        self.kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.heads)
        self.blocks = self._blocks()
        self.layer_of = {m: i for i, block in enumerate(self.blocks) for m in block.modules()}

    @property
    def name(self) -> str:
        """What the model calls itself."""
        return getattr(self.config, "_name_or_path", "") or type(self.model).__name__

    def attention(self, layer: int) -> nn.Module:
        """The child of a block that attends and projects back to the stream."""
        return self._child(self.blocks[layer], _ATTENTION, f"attention in block {layer}")

    def mlp(self, layer: int) -> nn.Module:
        """The child of a block that is its feed-forward part."""
        return self._child(self.blocks[layer], _MLP, f"feed-forward part in block {layer}")

    def norm_before_attention(self, layer: int) -> nn.Module:
        """The norm through which the attention of a block reads the stream."""
        return self._child(
            self.blocks[layer], _ATTENTION_NORM, f"norm before the attention in block {layer}"
        )

    def norm_before_mlp(self, layer: int) -> nn.Module:
        """The norm through which the feed-forward part of a block reads the stream."""
        return self._child(self.blocks[layer], _MLP_NORM, f"norm before the MLP in block {layer}")

    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        return self._child(self.body, _FINAL_NORM, "final norm")

    def output(self, layer: int) -> Any:
        """The matrix that takes the heads of a block back to the stream."""
        inside = self.attention(layer)
        return self._child(inside, _ATTENTION_OUT, f"output projection in block {layer}")

    def projection(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """W_O by query head, (Hq, Dv, width), and the bias (width,) of the output projection."""
        linear = self.output(layer)
        weight = linear.weight
        if isinstance(linear, nn.Linear):  # GPT-2 keeps its matrices the other way round
            weight = weight.T
        return weight.unflatten(0, (self.heads, -1)), linear.bias

    def contributions(self, layer: int, out: Tensor) -> Tensor:
        """What heads add to the stream, (B, Hq, L, width), of their outputs (B, Hq, L, Dv)."""
        weight, _ = self.projection(layer)
        return torch.einsum("bhld,hdw->bhlw", out.to(weight.dtype), weight)

    def check_heads(self, heads: Any) -> list[tuple[int, int]]:
        """Heads as (layer, head); IndexError, naming it, for one that the model does not have."""
        found = [(int(layer), int(head)) for layer, head in heads]
        for layer, head in found:
            if not (0 <= layer < self.layers and 0 <= head < self.heads):
                raise IndexError(
                    f"{self.name} has {self.layers} layers of {self.heads} heads, counted from 0: "
                    f"there is no head ({layer}, {head})"
                )
        return found

    def _blocks(self) -> list[nn.Module]:
        for module in self.body.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.layers:
                return list(module)
        raise self._missing(f"list of {self.layers} blocks")

    def _child(self, module: nn.Module, names: tuple[str, ...], what: str) -> Any:
        children = dict(module.named_children())
        for name in names:
            if name in children:
                return children[name]
        raise self._missing(what)

    def _missing(self, what: str) -> TypeError:
        return TypeError(f"{type(self.body).__name__}: no {what} was found")
