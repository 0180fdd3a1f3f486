"""PrFlash (2024, paper 121): blocks at random against a window of as many pairs."""

import torch

from foveate.attention.base import Attention
from foveate.attention.decode.pr_flash import PrFlash
from foveate.attention.sparse.sink_window import SinkWindow
from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import attending_layer, held_out_loss, speaker

CLAIM = "a model trained with blocks visited at random beats one trained with a window as dense"

_LENGTH, _BLOCK, _LAYERS, _STEPS = 128, 8, 4, 200


def measure() -> Outcome:
    """Loss (nats a byte) on held-out text of small models, trained and read on 128 bytes."""
    random = PrFlash(block=_BLOCK, rate=0.7)
    distance = torch.arange(_LENGTH // _BLOCK)
    pairs = distance.flip(0) + 1
    density = float((random.chance(distance) * pairs).sum() / pairs.sum())
    # A window of a share w of all tokens reads 1 - (1 - w)² of the pairs.
    width = round(_LENGTH * (1 - (1 - density) ** 0.5))
    figures = {
        "share of blocks": density,
        "loss, random": _trained(random),
        "loss, window": _trained(SinkWindow(sinks=0, window=width, block=_BLOCK)),
    }
    return Outcome(figures, figures["loss, random"] < figures["loss, window"])


def _trained(mechanism: Attention) -> float:
    """Loss of a model that attends under a mechanism."""
    layer = attending_layer(mechanism, _LAYERS, 64, 4)
    model = speaker(layer, length=_LENGTH, steps=_STEPS)
    return held_out_loss(model, _LENGTH)
