"""Two layers choose the tokens of a decoding step; the layers after them read only those."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from foveate import ops
from foveate.attention.base import Call, IndexReuse
from foveate.registry import Card, register


@register(
    Card(
        name="tidal",
        title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse "
        "Attention",
        claim="tokens that matter in one layer matter in the next: choose twice per step",
        kind="attention",
        family="decode",
        year=2024,
        paper=238,
        phases=("decode",),
        cost="per step (select_layer + 2)·n + the other layers·budget tokens read, not layers·n",
        decoding="full KV cache; nothing is kept from one step to the next",
        confidence="checked against the released code; its periodic recomputation of the cache "
        "is left out",
        small={"budget": 16, "select_layer": 0, "correct_layer": 2},
        full={"budget": 1 << 30},
    )
)
@dataclass(frozen=True, kw_only=True)
class Tidal(IndexReuse):
    """Layers up to `select_layer`, and `correct_layer`, are dense; these two choose tokens.

    The others read the `budget` tokens with the largest logits of the nearest choice before them,
    one list per query head (`scope` head) or per kv head, by the largest logit of its query heads
    (`scope` kv). The newest `always_last` tokens are always among them. `correct_layer` None is
    the layer at 0.4 of the depth; one that does not come after `select_layer` adds no choice.
    """

    budget: int = 256
    select_layer: int = 2
    correct_layer: int | None = None
    always_last: int = 1
    scope: str = "head"

    def __post_init__(self) -> None:
        ops.check_block("budget", self.budget)
        for name, value in (
            ("select_layer", self.select_layer),
            ("correct_layer", self.correct_layer or 0),
        ):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not 0 <= self.always_last <= self.budget:
            raise ValueError(
                f"always_last must be at least 0 and at most the budget {self.budget}, "
                f"got {self.always_last}"
            )
        if self.scope not in ("head", "kv"):
            raise ValueError(f"scope must be head or kv, got {self.scope!r}")

    def due(self, q: Tensor, k_len: int, call: Call) -> bool:
        """Dense and selecting layers, and those for which no layer of this step has chosen."""
        if call.layer <= self.select_layer or call.layer in self._selecting(call.layers):
            return True
        return self._chosen(k_len, call) is None

    def choose(self, q: Tensor, k: Tensor, call: Call) -> None:
        """Keep the tokens of the largest logits, where the layer is one that chooses."""
        if call.layer not in self._selecting(call.layers):
            return
        scale = 1.0 if call.scale is None else call.scale
        logits = ops.grouped_logits(q[:, :, -1:], k, scale)[:, :, 0]
        if self.scope == "kv":
            logits = logits.unflatten(1, (k.shape[1], -1)).amax(2)
        n = k.shape[2]
        logits[..., max(n - self.always_last, 0) :] = float("inf")
        idx = logits.topk(min(self.budget, n)).indices.sort().values
        call.state[call.layer].update(idx=idx, k_len=n)

    def recall(self, k_len: int, call: Call) -> Tensor:
        """The tokens of the nearest choice."""
        idx = self._chosen(k_len, call)
        if idx is None:
            raise RuntimeError(f"layer {call.layer}: no layer before it has chosen tokens")
        return idx

    def _selecting(self, layers: int) -> tuple[int, int]:
        correct = round(0.4 * layers) if self.correct_layer is None else self.correct_layer
        return self.select_layer, correct

    def _chosen(self, k_len: int, call: Call) -> Tensor | None:
        """What the nearest choosing layer before this one wrote in this very step."""
        for layer in sorted(self._selecting(call.layers), reverse=True):
            if layer < call.layer and self.acts(k_len, dataclasses.replace(call, layer=layer)):
                held = call.state.get(layer, {})
                return held["idx"] if held.get("k_len") == k_len else None
        return None
