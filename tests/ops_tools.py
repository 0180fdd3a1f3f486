"""What the tests of the primitives share: inputs, the reference beside the fast path, meters."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveate import ops
from foveate.native import kernels

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2}


def qkv(
    q_len, k_len, *, batch=2, q_heads=4, kv_heads=2, dim=8, v_dim=8, dtype=torch.float32, grad=False
):
    """Random q, k, v, the same on every call."""
    make = torch.Generator().manual_seed(q_len * 1000 + k_len)
    shapes = ((q_heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, v_dim))
    drawn = (torch.randn(batch, *s, generator=make, dtype=torch.float64) for s in shapes)
    return [x.to(dtype).requires_grad_(grad) for x in drawn]


def assert_same(got, want, dtype=torch.float32):
    """Two results agree, -inf with -inf, and hold no NaN."""
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert a.shape == b.shape
        assert not a.isnan().any()
        tol = TOLERANCE[dtype]
        torch.testing.assert_close(a, b, atol=tol, rtol=tol, check_dtype=False)


def held_to_reference(function, *args, **options):
    """Result of a primitive on the torch backend; it and the kernels' are held to the reference."""
    with ops.backend("reference"):
        want = function(*args, **options)
    for name in ("native", "torch") if kernels() else ("torch",):
        with ops.backend(name):
            got = function(*args, **options)
        assert_same(got, want, args[0].dtype)
    return got


def held_when_strong(call, lengths, grad):
    """A call stays finite and right at logits beyond ±1e4 of either sign.

    It is compared in float64: in float32 logits of that size are rounded to about 0.01.
    """
    ramp = torch.linspace(-1e4, 1e4, lengths[1]).view(1, 1, 1, -1)
    for strong in ({"scale": 1e4}, {"scale": -1e4}, {"bias": ramp}, {"bias": -ramp}):
        q, k, v = qkv(*lengths, grad=grad)
        out = call(q, k, v, **strong)[0]
        assert out.isfinite().all()
        if grad:
            out.sum().backward()
            assert all(x.grad.isfinite().all() for x in (q, k, v))
        q, k, v = qkv(*lengths, dtype=torch.float64, grad=grad)
        held_to_reference(call, q, k, v, **strong)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation puts out."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                stored = x.untyped_storage().nbytes() // x.element_size()
                self.numel = max(self.numel, min(x.numel(), stored))
        return out


def largest_output(call):
    """Elements of the largest tensor made on the way."""
    with Largest() as meter:
        call()
    return meter.numel


def kept_for_backward(call):
    """Elements that autograd keeps from forward to backward, over all distinct tensors."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = call()
    del out
    return sum({x.untyped_storage().data_ptr(): x.numel() for x in kept}.values())


def every_pair(mask, batch, heads, q_len, k_len):
    """A mask evaluated pair by pair: bool (batch, heads, Lq, Lk)."""
    b, h, q, k = torch.meshgrid(
        torch.arange(batch),
        torch.arange(heads),
        torch.arange(q_len) + max(k_len - q_len, 0),
        torch.arange(k_len),
        indexing="ij",
    )
    return mask(b, h, q, k).expand(batch, heads, q_len, k_len)
