"""`AttentionNoise`: a perturbation of attention logits that gradients reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from foveate.hf.parts import Parts
from foveate.hf.watch import Seen, watch


class AttentionNoise:
    """Tensors added to the logits of layers: delta by layer, broadcast to (B, Hq, Lq, Lk).

    Leaves that require a gradient get one from any loss of the model, for adversarial objectives.
    """

    def __init__(self, model: Any, delta: Mapping[int, Tensor]) -> None:
        parts = Parts(model)
        wrong = [layer for layer in delta if not 0 <= layer < parts.layers]
        if wrong:
            raise IndexError(f"{parts.name} has {parts.layers} layers, no layer {wrong[0]}")
        self._model, self.delta = model, dict(delta)

    @contextmanager
    def added(self) -> Iterator[None]:
        """Within this block the model attends with the perturbation."""

        def attention(seen: Seen) -> None:
            if seen.layer in self.delta:
                seen.bias = self.delta[seen.layer]

        with watch(self._model, attention=attention):
            yield
