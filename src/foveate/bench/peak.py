"""Peak memory of one prefill, measured in a process of its own (Linux)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from foveate.hf.attach import attach
from foveate.hf.builtin import load_builtin
from foveate.hf.parts import body
from foveate.hf.plan import slots_of
from foveate.hf.text import builtin_text, encode


def prefill_bytes(spec: str, tokens: int) -> int:
    """Peak resident bytes that a prefill of the built-in model adds, run in a new process."""
    command = [sys.executable, "-m", "foveate.bench.peak", spec, str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def _status(key: str) -> int:
    """A line of Linux's process status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the peak of memory is read from /proc/self/status, which has no {key}")


def _prefill(spec: str, tokens: int) -> int:
    model, tokenizer = load_builtin()
    ids = encode(tokenizer, builtin_text(), tokens)
    slots = {} if spec == "dense" else slots_of(spec)
    with torch.inference_mode(), attach(model, **slots):
        body(model)(ids[:, :64], use_cache=True)  # makes the weights resident
        # Loading left a peak of its own: set the mark back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        body(model)(ids, use_cache=True)
    return _status("VmHWM") - before


if __name__ == "__main__":
    sys.stdout.write(f"{_prefill(sys.argv[1], int(sys.argv[2]))}\n")
