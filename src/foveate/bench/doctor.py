"""Whether this installation is sound: what it runs on, what it computes, how fast."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate import native, ops
from foveate.bench.machine import machine
from foveate.bench.timing import paired
from foveate.hf.builtin import builtin_status

_LENGTH = 300  # of the checks: no multiple of anything, and the reference takes no time

Inputs = tuple[Tensor, Tensor, Tensor]
Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Check:
    """A primitive against the reference: largest absolute error, its bound, why it did not run."""

    name: str
    error: float
    bound: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the primitive ran and stayed within the bound; a NaN is not within it."""
        return not self.failure and self.error <= self.bound


def facts() -> dict[str, str]:
    """What this installation runs on, in words. Raises what `native.kernels` raises."""
    here = machine()
    kernels = native.isa()
    status = builtin_status()
    size = f"{status.bytes / 1e6:.0f} MB" if status.present else "not there yet"
    return {
        "backend": "torch" if kernels == "none" else "native",
        "kernels": f"{kernels} (FOVEATE_ISA={os.environ.get('FOVEATE_ISA', '')})",
        "kernels built": ", ".join(native.built()) or native.HOW_TO_GET,
        "kernels that run here": ", ".join([*native.runnable(), "none"]),
        "processor": here["cpu"],
        "threads": f"{here['threads']} on {here['cores']} cores",
        "memory": f"{here['memory_gib']} GiB",
        **{name: here[name] for name in ("foveate", "python", "torch", "transformers")},
        "built-in model": f"{status.path}: {size}",
    }


def checks() -> Iterator[Check]:
    """Each primitive with a kernel, on this installation's default backend."""
    for name, (call, dtype, bound) in _CALLS.items():
        yield _held(name, call, dtype, bound)


def dense_speed(tokens: int = 2048, rounds: int = 3) -> tuple[float, float]:
    """Seconds of dense causal attention and how many times faster than PyTorch's own it is."""
    q, k, v = _inputs(torch.float32, tokens, heads=(9, 3), dim=64)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        _, ours, ratio = paired(
            lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True),
            lambda: ops.attend(q, k, v, causal=True),
            rounds,
        )
    return ours, ratio


def _held(name: str, call: Callable[[Inputs], Result], dtype: torch.dtype, bound: float) -> Check:
    inputs = _inputs(dtype, _LENGTH, heads=(6, 2), dim=32)
    with torch.inference_mode(), ops.backend("reference"):
        want = call(inputs)
    try:
        with torch.inference_mode():
            got = call(inputs)
    except (RuntimeError, MemoryError) as error:
        return Check(name, math.inf, bound, str(error))
    errors = [float((a.double() - b.double()).abs().max()) for a, b in zip(got, want, strict=True)]
    return Check(name, math.nan if any(map(math.isnan, errors)) else max(errors), bound)


def _inputs(dtype: torch.dtype, length: int, heads: tuple[int, int], dim: int) -> Inputs:
    made = torch.Generator().manual_seed(0)
    q_heads, kv_heads = heads
    q = torch.randn(1, q_heads, length, dim, generator=made).to(dtype)
    k, v = torch.randn(2, 1, kv_heads, length, dim, generator=made).to(dtype)
    return q, k, v


def _attend(inputs: Inputs) -> Result:
    return ops.attend(*inputs, causal=True, return_lse=True)


def _decode(inputs: Inputs) -> Result:
    q, k, v = inputs
    return ops.attend(q[:, :, -1:], k, v, causal=True, return_lse=True)


def _block_sparse(inputs: Inputs) -> Result:
    rule = ops.sinks(4) | ops.window(100)
    layout = ops.from_mask(rule & ops.causal(), _LENGTH, _LENGTH, 32)
    return ops.block_sparse(*inputs, layout, mask=rule, return_lse=True)


def _gather(inputs: Inputs) -> Result:
    q, k, v = inputs
    scores = torch.rand(1, 1, 1, _LENGTH, generator=torch.Generator().manual_seed(1))
    idx = scores.topk(50).indices
    return ops.gather(q[:, :, -4:], k, v, idx, return_lse=True)


def _scan(inputs: Inputs) -> Result:
    q, k, v = inputs
    tokens = torch.rand(k.shape[:3], generator=torch.Generator().manual_seed(2))
    keys = torch.nn.functional.normalize(k, dim=-1)
    return ops.scan(q, keys, v, decay=-tokens, beta=tokens)


def _attend_quantized(inputs: Inputs) -> Result:
    q, k, v = inputs
    keys, values = (ops.quantize(x, 4, group=x.shape[3]) for x in (k, v))
    return ops.attend_quantized(q[:, :, -1:], keys, values, k_bits=4, v_bits=4, return_lse=True)


_CALLS: dict[str, tuple[Callable[[Inputs], Result], torch.dtype, float]] = {
    "attend": (_attend, torch.float32, 2e-5),
    "attend, bfloat16": (_attend, torch.bfloat16, 3e-2),
    "attend, one query": (_decode, torch.float32, 2e-5),
    "attend_quantized, 4 bits": (_attend_quantized, torch.float32, 1e-3),
    "block_sparse": (_block_sparse, torch.float32, 2e-5),
    "gather": (_gather, torch.float32, 2e-5),
    "scan, gated delta rule": (_scan, torch.float32, 2e-5),
}
"""Each with its type and the largest error of a sound kernel on values of unit variance."""
