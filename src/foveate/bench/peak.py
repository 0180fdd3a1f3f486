"""Peak memory of one prefill, measured in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys

import torch

from foveate.bench.runs import body
from foveate.hf.attach import attach
from foveate.hf.builtin import load_builtin
from foveate.hf.plan import slots_of
from foveate.hf.text import builtin_text, encode


def prefill_bytes(spec: str, tokens: int) -> int:
    """Peak resident bytes that a prefill of the built-in model adds, run in a new process."""
    command = [sys.executable, "-m", "foveate.bench.peak", spec, str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def _resident_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _prefill(spec: str, tokens: int) -> int:
    model, tokenizer = load_builtin()
    ids = encode(tokenizer, builtin_text(), tokens)
    slots = {} if spec == "dense" else slots_of(spec)
    with torch.inference_mode(), attach(model, **slots):
        # Loading leaves a peak of its own; a short prefill makes the weights resident.
        body(model)(ids[:, :64], use_cache=True)
        before = _resident_peak()
        body(model)(ids, use_cache=True)
    return _resident_peak() - before


if __name__ == "__main__":
    sys.stdout.write(f"{_prefill(sys.argv[1], int(sys.argv[2]))}\n")
