"""SAQ (2024, paper 121): a staircase of bits, and few bits beside exact recent tokens."""

from foveate.bench.claims import Outcome
from foveate.bench.claims._caches import judge

CLAIM = (
    "8, 4 and 2 bits by age beat 3 bits for all; with recent tokens exact 4 bits cost less than "
    "1% of perplexity, and 2 bits less than half of what rotated ones do"
)

# 1,024 tokens are eight blocks: one of 8 bits, one of 4 and six of 2 make 3 bits a number.
_PROMPT, _THEN, _SKIPS = 1024, 255, (0, 11_000)
_PLAIN, _RECENT = "block=128,recent=0,first=0", "block=32,recent=32"
# Tokens that are decoded one by one.
_STEPS = 128


def measure() -> Outcome:
    """KL to the full cache over 255 tokens, read at once after 1,024; two texts.

    Perplexity of 128 tokens decoded one by one, for what keeps recent tokens exact.
    """
    figures: dict[str, float] = {}
    for name, bits in (("staircase", "16/8/4/2"), ("3 bits", "16/3")):
        found = judge(f"saq:bits={bits},{_PLAIN}", _PROMPT, _THEN, _SKIPS)
        figures |= {f"KL, {name}": found.kl, f"times smaller, {name}": 1 / found.share}
    cost = {}
    full = judge(None, _PROMPT, _STEPS, step=1).perplexity
    figures["perplexity, full cache"] = full
    for name, policy in (
        ("4 bits", f"saq:bits=16/4,{_RECENT}"),
        ("2 bits", f"saq:bits=16/2,{_RECENT}"),
        ("rotated, 2 bits", "rotate_kv:bits=2"),
    ):
        found = judge(policy, _PROMPT, _STEPS, step=1)
        figures[f"perplexity, {name}"] = found.perplexity
        figures[f"times smaller, {name}"] = 1 / found.share
        cost[name] = found.perplexity / full - 1
    holds = (
        figures["KL, staircase"] < figures["KL, 3 bits"]
        and cost["4 bits"] <= 0.01
        and figures["times smaller, 4 bits"] >= 3.5
        and cost["2 bits"] < cost["rotated, 2 bits"] / 2
        and figures["times smaller, 2 bits"] >= 6
    )
    return Outcome(figures, holds)
