"""Fewer bits, then fewer tokens: what a share of the bytes can hold."""

from foveate.bench.claims import Outcome
from foveate.bench.claims._caches import judge

CLAIM = "a quarter of the bytes of 1,024 tokens serves within 0.025 nats, with the same best token"

_PROMPT, _THEN, _SKIPS = 1024, 255, (0, 11_000)


def measure() -> Outcome:
    """KL to the full cache and top-1 over 255 tokens after 1,024, unseen before; two texts."""
    figures: dict[str, float] = {}
    for share, rival in ((0.25, "snapkv:budget=256"), (0.125, "snapkv:budget=128")):
        for name, policy in (("auto", f"auto:share={share}"), ("snapkv", rival)):
            found = judge(policy, _PROMPT, _THEN, _SKIPS)
            figures |= {
                f"KL, {name}, {share}": found.kl,
                f"top-1, {name}, {share}": found.top1,
                f"share of bytes, {name}, {share}": found.share,
            }
    quarter = (figures[f"{name}, auto, 0.25"] for name in ("share of bytes", "KL", "top-1"))
    size, kl, top1 = quarter
    return Outcome(figures, size <= 0.25 and kl <= 0.025 and top1 >= 0.95)
