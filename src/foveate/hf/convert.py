"""A model whose attention layers are others, made from its own weights; it can be put back."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from foveate import ops
from foveate.hf.attach import is_attached
from foveate.hf.masks import LayerMask, plain_padding, understand
from foveate.hf.states import StateLayer, state_layer
from foveate.nn._attention import Projections
from foveate.nn._recurrent import Recurrent
from foveate.registry import Card, parse

# What a conversion takes from the model.
_GIVEN = ("weights", "heads", "theta")


@dataclass(frozen=True)
class Conversion:
    """A kind of layer, its options, and how it takes the place of a model's attention.

    `layers` are the indices of those it takes the place of, None for all.
    """

    layer: Any
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, spec: str) -> Conversion:
        """What a string `name:key=value,…` names.

        Raises TypeError for what is made from no trained layer, ValueError for options that it does
        not take from such a one.
        """
        layer, options = parse(spec)
        if not hasattr(layer, "converted"):
            raise TypeError(f"{layer.card.name} is not made from the layers of a trained model")
        takes = set(inspect.signature(layer.converted).parameters) - set(_GIVEN)
        if wrong := sorted(set(options) - takes):
            raise ValueError(
                f"{layer.card.name} in the place of trained layers takes "
                f"{', '.join(sorted(takes))}, got {', '.join(wrong)}"
            )
        return cls(layer, options)

    @property
    def card(self) -> Card:
        """That of the layer."""
        card: Card = self.layer.card
        return card

    def apply(self, model: Any) -> Converted:
        """Replace the attention of a transformers decoder; use as a context manager or `undo`.

        Raises TypeError or ValueError, and changes nothing, for a model whose attention has other
        parts than four projections and a rotary embedding or lacks a layer that is to be
        converted, RuntimeError for an attached one.
        """
        decoder = model.get_decoder()
        if is_attached(decoder):
            raise RuntimeError(f"{type(model).__name__} is attached: leave that block first")
        heads = int(decoder.config.num_attention_heads)
        places = [
            (parent, name, child)
            for parent in decoder.modules()
            for name, child in parent.named_children()
            if hasattr(child, "layer_idx") and hasattr(child, "q_proj")
        ]
        if not places:
            raise TypeError(f"{type(model).__name__} has no attention that could be converted")
        if self.layers is not None:
            found = {int(old.layer_idx): (parent, name, old) for parent, name, old in places}
            if missing := sorted(set(self.layers) - set(found)):
                raise ValueError(
                    f"{type(model).__name__} has layers 0 to {max(found)}, "
                    f"got {', '.join(map(str, missing))}"
                )
            places = [found[layer] for layer in sorted(set(self.layers))]
        new = [Place(self._layer(old, heads), old) for *_, old in places]
        return Converted(places, new)

    def _layer(self, old: nn.Module, heads: int) -> Any:
        weights = Projections.of(old)
        scale, softcap = (
            getattr(old, name, None) for name in ("scaling", "attn_logit_softcapping")
        )
        usual = (weights.q.shape[0] // heads) ** -0.5
        if softcap is not None or abs((usual if scale is None else scale) - usual) > 1e-6:
            raise ValueError(
                f"a layer to convert must have logits scaled by {usual:.4g} and uncapped, got a "
                f"scale of {scale} and a cap of {softcap}"
            )
        return self.layer.converted(weights, heads, **self.options)


class Place(nn.Module):
    """A layer where a model's attention was: the model rotates, masks and keeps for it.

    The layer is an `AttentionLayer`, or a recurrence that can go on from two sums (`summed`).
    """

    def __init__(self, layer: Any, old: Any) -> None:
        super().__init__()
        self.layer, self.layer_idx, self.config = layer, int(old.layer_idx), old.config

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls it: tokens (B, L, dim) -> (B, L, dim)."""
        if is_attached(self):
            raise RuntimeError(
                "a converted model attends by its own layers: put it back before attaching"
            )
        layer: Any = self.layer
        q, k, v = layer.split(hidden_states, hidden_states)
        q, k = (ops.rope(x, *position_embeddings) for x in (q, k))
        seen = understand(attention_mask, True, q.shape[2])
        if isinstance(self.layer, Recurrent):
            out = self._summed(q, k, v, seen, past_key_values)
        else:
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
            out = layer.attend(q, k, v, seen.causal, seen.rule)
        return layer.joined(out), None

    def _summed(self, q: Tensor, k: Tensor, v: Tensor, seen: LayerMask, cache: Any) -> Tensor:
        """Heads of a recurrence, which goes on from what the cache holds of it."""
        layer: Any = self.layer
        held = StateLayer() if cache is None else state_layer(cache, self.layer_idx)
        valid = plain_padding(seen, q.shape[2], held.count + k.shape[2])
        heads: Tensor
        heads, state = layer.summed(q, k, v, held.read(), valid)
        held.write(state, k.shape[2])
        return heads


class Converted:
    """A model with other layers in its `places`; `layers` are those, by their index."""

    def __init__(self, places: list[tuple[nn.Module, str, nn.Module]], new: list[Place]) -> None:
        self._old = places
        self.layers = nn.ModuleDict({str(place.layer_idx): place.layer for place in new})
        for (parent, name, _), place in zip(places, new, strict=True):
            setattr(parent, name, place)

    def undo(self) -> None:
        """Put the model's own layers back; harmless when done twice."""
        for parent, name, old in self._old:
            setattr(parent, name, old)

    def __enter__(self) -> Converted:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()
