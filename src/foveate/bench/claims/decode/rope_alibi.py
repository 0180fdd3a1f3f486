"""RoPE times ALiBi (2024, paper 121): trained on short rows, read on long ones."""

from foveate.attention.decode.rope_alibi import RopeALiBi
from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import attending_layer, held_out_loss, speaker

CLAIM = "trained on 64 bytes, 512 are as easy with a penalty on distance, not by rotation alone"

_DIM, _HEADS, _LAYERS, _SHORT, _LONG = 64, 4, 4, 64, 512


def measure() -> Outcome:
    """Loss (nats a byte) of small language models on held-out text, by length."""
    figures: dict[str, float] = {}
    for name, slope in (("rotation alone", 0.0), ("rotation and penalty", 1.0)):
        for length, loss in _losses(slope).items():
            figures[f"loss, {name}, {length}"] = loss
    alone, long, short = (
        figures[f"loss, {name}"]
        for name in (
            f"rotation alone, {_LONG}",
            f"rotation and penalty, {_LONG}",
            f"rotation and penalty, {_SHORT}",
        )
    )
    return Outcome(figures, long < alone and long <= short)


def _losses(slope: float) -> dict[int, float]:
    """By length, of a model trained on short rows with a slope."""
    mechanism = RopeALiBi(slope=slope)
    model = speaker(attending_layer(mechanism, _LAYERS, _DIM, _HEADS), length=_SHORT)
    return {length: held_out_loss(model, length) for length in (_SHORT, _LONG)}
