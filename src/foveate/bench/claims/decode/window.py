"""StreamingLLM (2023): with the first few tokens kept, a window of recent tokens serves."""

from foveate.bench.claims import Outcome
from foveate.bench.claims._caches import judge

CLAIM = "four sinks win back most of what a window of recent tokens loses without them"

_PROMPT, _THEN, _BUDGET, _SKIPS = 1024, 256, 256, (0, 11_000)


def measure() -> Outcome:
    """Perplexity of 256 tokens after 1,024, of which 256 are kept; two texts."""
    figures: dict[str, float] = {}
    for name, policy in (
        ("full cache", None),
        ("four sinks", f"window:budget={_BUDGET},sinks=4"),
        ("one sink", f"window:budget={_BUDGET},sinks=1"),
        ("no sink", f"window:budget={_BUDGET},sinks=0"),
    ):
        figures[f"perplexity, {name}"] = judge(policy, _PROMPT, _THEN, _SKIPS).perplexity
    full, four, _, none = figures.values()
    figures["share of the loss won back"] = won = (none - four) / (none - full)
    return Outcome(figures, none > full and won > 0.5)
