"""EMS (2024, paper 91): two scores together, and merging what is redundant."""

from foveate.bench.claims import Outcome
from foveate.bench.claims._caches import judge

CLAIM = (
    "global and local scores joined, with merging, predict the text after a compressed prompt "
    "better than eviction by either score alone"
)

_PROMPT, _THEN, _SKIPS = 1024, 256, (0, 23_000)
_PLAIN = "space=post,tau=0.6,mass=false"


def measure() -> Outcome:
    """Perplexity of 256 tokens after 1,024 kept in 64 or 128 slots; two texts."""
    figures: dict[str, float] = {
        "perplexity, full cache": judge(None, _PROMPT, _THEN, _SKIPS).perplexity
    }
    holds = True
    for budget in (64, 128):
        specs = {
            "global": f"h2o:budget={budget},recent={32 / budget}",
            "local": f"snapkv:budget={budget},pool=1",
            "joined": f"ems:budget={budget},window=32,reach=1",
            "joined and merged": f"ems:budget={budget},window=32",
            "merged as stored, without mass": f"ems:budget={budget},window=32,{_PLAIN}",
        }
        found = {
            name: judge(spec, _PROMPT, _THEN, _SKIPS).perplexity for name, spec in specs.items()
        }
        figures |= {f"perplexity, {name}, {budget}": x for name, x in found.items()}
        alone = min(found["global"], found["local"])
        holds = holds and found["joined and merged"] < alone
    return Outcome(
        figures,
        holds,
        "The default options are judged; how keys are merged is a reconstruction.",
    )
