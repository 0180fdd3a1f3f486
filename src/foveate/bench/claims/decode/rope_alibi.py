"""RoPE times ALiBi (2024, paper 121): trained on short rows, read on long ones."""

from foveate.attention.decode.rope_alibi import RopeALiBi
from foveate.bench.claims import Outcome
from foveate.bench.claims._toys import Attending, held_out_loss, speaker

CLAIM = "trained on 64 bytes, 512 are as easy with a penalty on distance, not by rotation alone"

_DIM, _HEADS, _LAYERS, _SHORT, _LONG = 64, 4, 4, 64, 512


def measure() -> Outcome:
    """Loss (nats a byte) of a small language model on held-out text, by length."""
    figures: dict[str, float] = {}
    for name, slope in (("rotation alone", 0.0), ("rotation and penalty", 1.0)):
        mechanism = RopeALiBi(slope=slope)
        model = speaker(
            lambda index, mechanism=mechanism: Attending(mechanism, index, _LAYERS, _DIM, _HEADS)
        )
        for length in (_SHORT, _LONG):
            figures[f"loss, {name}, {length}"] = held_out_loss(model, length)
    with_penalty, alone = (
        figures[f"loss, {name}, {_LONG}"] for name in ("rotation and penalty", "rotation alone")
    )
    short = figures[f"loss, rotation and penalty, {_SHORT}"]
    return Outcome(figures, with_penalty < alone and with_penalty <= short)
