"""QuaRot (2024): at equal bits, heads that were rotated come through better than others."""

from foveate.bench.claims import Outcome
from foveate.bench.claims._caches import judge

CLAIM = "at 4 and at 2 bits a token's groups hold rotated heads better than heads as they are"

_PROMPT, _THEN, _SKIPS = 1024, 255, (0, 11_000)
_OPTIONS = "recent=0,first=0"


def measure() -> Outcome:
    """KL to the full cache, top-1 and bytes over 255 tokens after 1,024; two texts."""
    figures: dict[str, float] = {}
    for bits in (4, 2):
        for name, policy in (
            ("rotated", f"quarot:bits=16/{bits},{_OPTIONS}"),
            ("as they are", f"quarot:bits=16/{bits},rotate=false,{_OPTIONS}"),
            ("rotate_kv", f"rotate_kv:bits={bits}"),
            ("rotated, newest exact", f"quarot:bits=16/{bits}"),
        ):
            found = judge(policy, _PROMPT, _THEN, _SKIPS)
            figures |= {f"KL, {bits} bits, {name}": found.kl}
            figures |= {f"top-1, {bits} bits, {name}": found.top1}
            figures |= {f"share of bytes, {bits} bits, {name}": found.share}
    gains = (
        figures[f"KL, {bits} bits, rotated"] < figures[f"KL, {bits} bits, as they are"]
        for bits in (4, 2)
    )
    return Outcome(figures, all(gains))
