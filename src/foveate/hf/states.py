"""Cache layers that hold the state of a recurrence in the place of keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from foveate.hf.layers import Stateful

State = tuple[Tensor, Tensor]
"""Sums over the tokens so far, each (B, …)."""


class StateLayer(Stateful, DynamicLayer):
    """What a linear layer keeps: its two sums stand where others hold keys and values.

    So they follow the rows of a batch as keys do, and are as large after any number of tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def read(self) -> State | None:
        """The sums so far; None before the first token."""
        return (self.keys, self.values) if self.count else None

    def write(self, state: State, tokens: int) -> None:
        """Hold the sums after so many more tokens."""
        (self.keys, self.values), self.is_initialized = state, True
        self.dtype, self.device = state[0].dtype, state[0].device
        self.count += tokens

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: only the converted layer that made it can go on from it."""
        raise ValueError("this cache was filled by a converted model: start with an empty one")

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.count

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.count = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a sum does not know what its last tokens added."""
        if tokens_to_remove:
            raise ValueError("a linear layer cannot take back tokens that it has summed up")


def state_layer(cache: Any, index: int) -> StateLayer:
    """Layer `index` of a dynamic cache, which becomes one that holds a state.

    Raises ValueError for another kind of cache, and for a layer that holds keys already.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"a linear layer keeps its state in a DynamicCache, got {type(cache)}")
    while len(layers) <= index:
        layers.append(DynamicLayer())
    found = layers[index]
    if isinstance(found, StateLayer):
        return found
    if not isinstance(found, DynamicLayer) or found.get_seq_length():
        raise ValueError(
            f"layer {index} of this cache, a {type(found).__name__}, was filled before the model "
            "was converted: start with an empty DynamicCache"
        )
    layers[index] = StateLayer()
    return layers[index]
