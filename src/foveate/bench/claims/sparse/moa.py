"""MoA (2024, paper 137): spans by head, searched from a profile, against one window for all."""

import math

from foveate.attention.sparse.moa import MoA
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import judge, loaded, text_ids
from foveate.bench.tune.influence import influence, spans

CLAIM = "spans searched per head lose less than one window for all heads of the same density"

_TOKENS, _DENSITY = 4096, 0.5


def measure() -> Outcome:
    """Profiles at 512 and 1,024 tokens, far from the text that is judged at 4,096."""
    model, _ = loaded()
    profiles = [
        influence(model, [text_ids(n, skip=20_000 + i * n) for i in range(count)])
        for n, count in ((512, 4), (1024, 2))
    ]
    searched = judge(_TOKENS, spans(profiles, density=_DENSITY, lengths=[_TOKENS]))
    # A window of a share w of all tokens reads 1 - (1 - w)² of the pairs.
    share = 1 - math.sqrt(1 - (searched.density or 1.0))
    uniform = judge(_TOKENS, MoA(alpha=(-64.0,), beta=(share,)))
    figures = {
        "density, searched": searched.density or 1.0,
        "density, uniform": uniform.density or 1.0,
        "KL, searched": searched.kl,
        "KL, uniform": uniform.kl,
        "perplexity, searched": searched.perplexity,
        "perplexity, uniform": uniform.perplexity,
    }
    return Outcome(figures, searched.kl < uniform.kl)
