"""SnapKV (2024): the end of a prompt votes for what the answer will need."""

from foveate.bench.claims import Outcome
from foveate.bench.claims._caches import judge

CLAIM = "tokens that the end of a prompt votes for serve what follows better than recent tokens do"

_PROMPT, _THEN, _BUDGET, _SKIPS = 1024, 256, 256, (0, 11_000, 23_000)


def measure() -> Outcome:
    """KL and top-1 agreement with the full cache over 256 tokens after 1,024; three texts."""
    figures: dict[str, float] = {}
    for name, policy in (
        ("votes", f"snapkv:budget={_BUDGET}"),
        ("votes, unsmoothed", f"snapkv:budget={_BUDGET},pool=1"),
        ("votes, heads share", f"snapkv:budget={_BUDGET},floor=0.2"),
        ("window", f"window:budget={_BUDGET}"),
    ):
        found = judge(policy, _PROMPT, _THEN, _SKIPS)
        figures |= {f"KL, {name}": found.kl, f"top-1, {name}": found.top1}
    better = figures["KL, votes"] < figures["KL, window"]
    return Outcome(figures, better and figures["top-1, votes"] > figures["top-1, window"])
