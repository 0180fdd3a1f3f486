"""SinkLoRA (2024, paper 28): sinks and fewer shifted heads stay nearer to dense attention."""

from foveate.attention.sparse.sinklora import SinkLoRA
from foveate.bench.claims import Outcome
from foveate.bench.claims._builtin import judge

CLAIM = "at one group size, sinks and fewer shifted heads are nearer to dense than shifted groups"

_TOKENS = 2048


def measure() -> Outcome:
    """KL to dense attention without training, of shifted groups and of each change to them."""
    variants = {
        "shifted groups": SinkLoRA(rho=1.0, sinks=0),
        "with sinks": SinkLoRA(rho=1.0),
        "with fewer shifted": SinkLoRA(sinks=0),
        "with both": SinkLoRA(),
    }
    kl = {f"KL, {name}": judge(_TOKENS, m).kl for name, m in variants.items()}
    holds = kl["KL, with both"] < kl["KL, shifted groups"]
    return Outcome(kl, holds, "seen without the fine-tuning that the paper measures after")
