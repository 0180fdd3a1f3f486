"""The query, key, value and output weights of single heads inside a model's matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.hf.ablate import by_layer
from foveate.hf.parts import Parts

_ROLES = {"q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value")}


class Slice(NamedTuple):
    """Where the features of one role are: rows [start, stop) of the matrix of a module.

    A matrix of GPT-2 is the other way round: `turned`, its features are columns.
    """

    module: Any
    start: int
    stop: int
    turned: bool

    def features(self, tensor: Tensor) -> Tensor:
        """The part of a matrix, or of its gradient, that makes these features: (features, width).

        A view: what is written into it is written into the matrix.
        """
        return (tensor.T if self.turned else tensor)[self.start : self.stop]


def projection(parts: Parts, layer: int, role: str) -> Slice:
    """Where a layer's queries ("q"), keys ("k") or values ("v") are made.

    Raises TypeError, naming the layer, for a model that has no such matrix.
    """
    named = parts.attention(layer).named_modules()
    modules = {name.rpartition(".")[2]: module for name, module in named}
    for name in _ROLES[role]:
        if name in modules:
            return Slice(modules[name], 0, len(modules[name].weight), False)
    for name in ("qkv_proj", "c_attn"):
        if name in modules:
            turned = not isinstance(modules[name], nn.Linear)
            size = modules[name].weight.shape[turned]
            share = size // (parts.heads + 2 * parts.kv_heads)
            sizes = [parts.heads * share, *[parts.kv_heads * share] * 2]
            start = sum(sizes[: "qkv".index(role)])
            return Slice(modules[name], start, start + sizes["qkv".index(role)], turned)
    raise TypeError(f"{parts.name}: no matrix that makes {role} was found in block {layer}")


@contextmanager
def only_heads(
    model: Any, heads: Iterable[tuple[int, int]], *, mlps: Iterable[int] = ()
) -> Iterator[list[nn.Parameter]]:
    """Let gradients reach nothing but the weights of query heads (layer, head) and whole MLPs.

    Yields the parameters to train. Of a head these are its slices of W_Q, W_K, W_V and W_O and of
    the biases of the first three; keys and values it shares with its group. The gradient of all
    else in these matrices is 0, but decay of weights would reach it: train without. On exit
    parameters require gradients as before. Raises IndexError for a head or MLP out of range.
    """
    parts = Parts(model)
    chosen = by_layer(parts.check_heads(heads))
    whole = [
        parameter for i in _check_layers(parts, mlps) for parameter in parts.mlp(i).parameters()
    ]
    masks = {id(p): (p, torch.ones_like(p)) for p in whole}
    for layer, own in chosen.items():
        for parameter, mask in _of_heads(parts, layer, own):
            held = masks.get(id(parameter), (parameter, torch.zeros_like(parameter)))[1]
            masks[id(parameter)] = parameter, torch.maximum(held, mask)
    before = [(p, p.requires_grad) for p in model.parameters()]
    hooks = []
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in masks)
        for parameter, mask in masks.values():
            hooks.append(parameter.register_hook(lambda grad, mask=mask: grad * mask))
        yield [parameter for parameter, _ in masks.values()]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required in before:
            parameter.requires_grad_(required)


def _of_heads(parts: Parts, layer: int, heads: list[int]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Parameters of some heads of a layer, each with a mask of what is theirs."""
    group = parts.heads // parts.kv_heads
    for role in "qkv":
        where = projection(parts, layer, role)
        count = parts.heads if role == "q" else parts.kv_heads
        own = heads if role == "q" else [head // group for head in heads]
        mask = torch.zeros_like(where.module.weight)
        where.features(mask).unflatten(0, (count, -1))[own] = 1.0
        yield where.module.weight, mask
        if where.module.bias is not None:
            mask = torch.zeros_like(where.module.bias)
            mask[where.start : where.stop].view(count, -1)[own] = 1.0
            yield where.module.bias, mask
    out = parts.output(layer)
    mask = torch.zeros_like(out.weight)
    inputs = mask.T if isinstance(out, nn.Linear) else mask
    inputs.unflatten(0, (parts.heads, -1))[heads] = 1.0
    yield out.weight, mask


def _check_layers(parts: Parts, layers: Iterable[int]) -> list[int]:
    found = list(layers)
    for layer in found:
        if not 0 <= layer < parts.layers:
            raise IndexError(f"{parts.name} has {parts.layers} layers, no MLP of layer {layer}")
    return found
