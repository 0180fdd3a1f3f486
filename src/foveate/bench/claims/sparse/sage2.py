"""SageAttention2 (2024, paper 113): smoothing makes 4-bit queries and keys usable."""

from foveate.attention.sparse.sage2 import Sage2
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import judge

CLAIM = "4 bits get better with each smoothing; 8 bits change perplexity by less than 1 %"

_TOKENS = 1024


def measure() -> Outcome:
    """KL to dense of every variant, and the perplexity of 8 bits over that of no rounding."""
    variants = {
        "4 bits": Sage2(smooth_k=False, smooth_q=False),
        "4 bits, smooth k": Sage2(smooth_q=False),
        "4 bits, smooth q and k": Sage2(),
        "8 bits, smooth k": Sage2(qk_bits=8, smooth_q=False),
    }
    judged = {name: judge(_TOKENS, mechanism) for name, mechanism in variants.items()}
    exact = judge(_TOKENS, Sage2(qk_bits=None, pv="exact")).perplexity
    figures = {f"KL, {name}": x.kl for name, x in judged.items()}
    loss = judged["8 bits, smooth k"].perplexity / exact - 1
    figures["perplexity change, 8 bits"] = loss
    kls = [x.kl for x in judged.values()]
    return Outcome(figures, kls == sorted(kls, reverse=True) and abs(loss) < 0.01)
