"""H2O (2023): heavy hitters beside the recent tokens."""

from foveate.bench.claims import Outcome
from foveate.bench.claims._caches import judge

CLAIM = "half of a budget spent on heavy hitters keeps a prompt better than all of it on a window"

_PROMPT, _THEN, _SKIPS = 1024, 256, (0, 11_000)


def measure() -> Outcome:
    """KL and top-1 agreement with the full cache over 256 tokens after 1,024; two texts."""
    figures: dict[str, float] = {}
    holds = True
    for budget in (128, 256):
        kl = {}
        for name, policy in (("heavy hitters", "h2o"), ("window", "window")):
            found = judge(f"{policy}:budget={budget}", _PROMPT, _THEN, _SKIPS)
            kl[name] = found.kl
            figures |= {
                f"KL, {name}, {budget}": found.kl,
                f"top-1, {name}, {budget}": found.top1,
            }
        holds = holds and kl["heavy hitters"] < kl["window"]
    return Outcome(figures, holds)
