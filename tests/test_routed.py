from importlib import import_module

import pytest
import torch

from foveate import ops
from sparse_checks import qkv


@pytest.fixture(autouse=True, scope="module")
def pairs():
    """The way of many pairs also for the few of these tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(import_module("foveate.ops.block_sparse"), "_FEW", 0)
        yield


def layout_of(block, lq, lk, *, fill=0.6, heads=4, batch=2, seed=0):
    """Random lists of blocks per query row; some rows list nothing."""
    g = torch.Generator().manual_seed(seed)
    n = -(-lk // block)
    kept = torch.rand(batch, heads, lq, n, generator=g) < fill
    kept[:, :, ::7] = False
    return ops.from_map(kept, (1, block), (lq, lk))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lq", "lk", "block"), [(61, 61, 8), (600, 600, 300), (20, 61, 16)])
def test_equals_block_sparse(heads, causal, lq, lk, block):
    q, k, v = qkv(lk, lq, batch=2)
    layout = layout_of(block, lq, lk, heads=heads)
    out, lse = ops.block_sparse(q, k, v, layout, causal=causal, return_lse=True)
    with ops.backend("reference"):
        want, want_lse = ops.block_sparse(q, k, v, layout, causal=causal, return_lse=True)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
    assert torch.isinf(lse[:, :, ::7]).all() and not out[:, :, ::7].any()


def test_mask_scale_softcap_and_a_list_shared_by_the_batch():
    q, k, v = qkv(61, batch=2)
    layout = layout_of(8, 61, 61, batch=1)
    mask = ops.documents(torch.stack([torch.arange(61) // 25, torch.arange(61) // 40]))
    options = {"mask": mask, "scale": 0.4, "softcap": 3.0}
    out, lse = ops.block_sparse(q, k, v, layout, return_lse=True, **options)
    with ops.backend("reference"):
        want, want_lse = ops.block_sparse(q, k, v, layout, return_lse=True, **options)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


def test_gradients_are_exact():
    q, k, v = (x.requires_grad_() for x in qkv(9, heads=2, kv_heads=1, dim=2, dtype=torch.float64))
    layout = layout_of(3, 9, 9, heads=2, batch=1)
    assert layout.counts.any()
    assert torch.autograd.gradcheck(lambda *x: ops.block_sparse(*x, layout), (q, k, v))


def test_a_single_query_equals_the_row_of_many():
    q, k, v = qkv(50)
    layout = layout_of(8, 50, 50, batch=1)
    want = ops.block_sparse(q, k, v, layout)
    last = ops.BlockLayout(layout.indices[:, :, -1:], layout.counts[:, :, -1:], (1, 8), (1, 50))
    step = ops.block_sparse(q[:, :, -1:], k, v, last)
    torch.testing.assert_close(step, want[:, :, -1:], atol=1e-5, rtol=1e-5)
