"""A text that a model has read once, and the caches of the requests that follow it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveate.attention.base import Attention, Shared
from foveate.cache.base import CachePolicy
from foveate.hf.adopt import positions_of
from foveate.hf.layers import FullLayer, SlidingLayer


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of a text, and of documents after it, that any number of requests share.

    layers holds them for every layer of the model, tokens is the length of the text, documents
    are those of the documents. Requests start at position `end`.
    """

    layers: tuple[Shared, ...]
    tokens: int
    documents: tuple[int, ...]
    decoder: weakref.ref[Any]

    @property
    def end(self) -> int:
        """The position of a request's first token: after the text and the longest document."""
        return self.tokens + max(self.documents, default=0)

    def nbytes(self) -> int:
        """Bytes held, however many requests follow."""
        return sum(_bytes(layer) for layer in self.layers)

    def check(
        self,
        decoder: Any,
        mechanisms: Sequence[Attention | None],
        policies: Sequence[CachePolicy | None],
    ) -> None:
        """ValueError when the prefix is another model's, or a slot does not go with prefixes."""
        if self.decoder() is not decoder:
            raise ValueError(
                "this prefix was made with another model: its keys mean nothing to "
                f"{type(decoder).__name__}; make it anew with foveate.prefix(model, …)"
            )
        for mechanism in mechanisms:
            if mechanism is not None and not mechanism.reads_shared:
                raise ValueError(
                    f"{mechanism.card.name} reads the keys of a request only, not those of a "
                    "shared prefix: leave the slot empty, or fill it with relay or ape"
                )
        for policy in policies:
            if policy is not None:
                raise ValueError(
                    f"cache={policy.card.name} does not go with a prefix: requests that follow a "
                    "prefix are stored whole"
                )

    def moved(self, kwargs: dict[str, Any], cache: Any) -> Tensor:
        """Positions of a decoder call's tokens, counted on from the prefix."""
        return positions_of(kwargs, 0 if cache is None else cache.get_seq_length())[0] + self.end


class TailLayer(FullLayer):
    """Stores what follows a prefix; the batch and all that moves its rows concern this alone."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared
        self.open = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append; returns the keys and values that follow the prefix."""
        if not self.open:
            raise ValueError(
                "this cache holds what follows a prefix: use it inside "
                "foveate.attach(model, prefix=…) only, or start with an empty cache"
            )
        held, batch = self._batch(), key_states.shape[0]
        if self.get_seq_length() and held != batch:
            raise ValueError(
                f"this cache holds {held} requests, but the call brings {batch}: each request "
                "goes on in a row of its own; start with an empty cache"
            )
        return super().update(key_states, value_states)

    def forget(self) -> None:
        """End a call."""
        self.open = False

    def nbytes(self) -> int:
        """Bytes of the tails, and of the prefix once."""
        return super().nbytes() + _bytes(self.shared)


def follow(cache: Any, prefix: Prefix | None) -> None:
    """Make the layers of a cache follow a prefix, or none; ValueError when they hold otherwise."""
    for i, layer in enumerate(cache.layers):
        wanted = None if prefix is None or i >= len(prefix.layers) else prefix.layers[i]
        if isinstance(layer, TailLayer):
            layer.open = True
        if wanted is getattr(layer, "shared", None):
            continue
        if layer.get_seq_length():
            raise ValueError(
                f"this cache already holds {layer.get_seq_length()} tokens that followed "
                "another prefix, or none: start with an empty cache"
            )
        new = FullLayer() if wanted is None else TailLayer(wanted)
        new.memory = layer.memory
        cache.layers[i] = new


def refuse_windows(cache: Any) -> None:
    """ValueError when a layer of the model sees a sliding window only."""
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, SlidingLayer):
            raise ValueError(
                f"layer {i} of this model sees a window of {layer.sliding_window} tokens: a "
                "prefix would drop out of its sight, so it cannot be shared exactly"
            )


def _bytes(shared: Shared) -> int:
    tensors = (shared.k, shared.v, *(shared.documents or ()))
    return sum(x.untyped_storage().nbytes() for x in tensors)
