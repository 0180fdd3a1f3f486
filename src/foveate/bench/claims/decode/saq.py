"""SAQ (2024, paper 121): a staircase of bits against one width at the same average."""

from foveate.bench.claims import Outcome
from foveate.bench.claims._caches import judge

CLAIM = "at three bits on average, a staircase of 8, 4 and 2 bits serves better than 3 bits for all"

# 1,024 tokens are eight blocks: one of 8 bits, one of 4 and six of 2 make 3 bits a number.
_PROMPT, _THEN, _SKIPS = 1024, 255, (0, 11_000)
_OPTIONS = "block=128,group=32,recent=0,first=0"


def measure() -> Outcome:
    """KL to the full cache, perplexity and bytes over 255 tokens after 1,024; two texts."""
    figures: dict[str, float] = {}
    for name, policy in (
        ("staircase", f"saq:bits=16/8/4/2,{_OPTIONS}"),
        ("3 bits", f"saq:bits=16/3,{_OPTIONS}"),
        ("4 bits, recent exact", "saq"),
        ("2 bits, recent exact", "saq:bits=16/2,recent=128"),
        ("rotate_kv, 4 bits", "rotate_kv:bits=4"),
        ("rotate_kv, 2 bits", "rotate_kv:bits=2"),
    ):
        found = judge(policy, _PROMPT, _THEN, _SKIPS)
        figures |= {f"KL, {name}": found.kl, f"top-1, {name}": found.top1}
        figures[f"share of bytes, {name}"] = found.share
    return Outcome(figures, figures["KL, staircase"] < figures["KL, 3 bits"])
