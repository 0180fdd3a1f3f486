"""Based (2024, paper 282): what is recalled against the bytes that decoding keeps."""

from __future__ import annotations

from itertools import pairwise

from foveate.bench.claims import Outcome
from foveate.bench.claims.linear._models import compared
from foveate.bench.recall.learn import Recall, learn

CLAIM = "the more bytes a state has, in features or in the window beside them, the more it recalls"

_TASK = Recall(vocabulary=256, filler=True, width=64, steps=300, lr=1e-2, test_rows=300)


def measure() -> Outcome:
    """Recall of 4 pairs with 2, 4 and 16 channels a query; with no window, and of 16 and 32 tokens.

    Two layers: two of linear attention, or one and one of softmax within the window.
    """
    figures: dict[str, float] = {}
    wider = [_learned(figures, f"{n} channels", f"based:qk_width={n}") for n in (2, 4, 16)]
    windows = wider[:1]
    for n in (16, 32):
        pattern = f"based:qk_width=2, softmax_attention:window={n}"
        windows.append(_learned(figures, f"2 channels, window {n}", pattern))
    return compared(figures, _rises(wider) and _rises(windows))


def _learned(figures: dict[str, float], name: str, pattern: str) -> tuple[int, float]:
    """Bytes of the state and accuracy, which are noted too."""
    found = learn(pattern, _TASK)
    figures[f"accuracy, {name}"] = found.accuracy
    figures[f"state KB, {name}"] = found.state_bytes / 1e3
    return found.state_bytes, found.accuracy


def _rises(points: list[tuple[int, float]]) -> bool:
    """Whether more bytes recalled more, from each point to the next."""
    return all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(points))
