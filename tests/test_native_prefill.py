"""The CPU kernels behind `attend` and `block_sparse`, at real sizes and on awkward input."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from foveate import ops
from foveate.native import kernels
from ops_tools import assert_same, qkv

pytestmark = pytest.mark.skipif(kernels() is None, reason="the CPU kernels are not in use")

MASKS = {
    "causal": None,
    "window": ops.window(70),
    "window and sinks": ops.window(30) | ops.sinks(5),
    "window by head": ops.window(torch.tensor([5, 9, 1, 30, 60, 300])),
    "strided": ops.strided(7, block=4),
    "documents": ops.documents(torch.arange(500) // 90),
    "padding": ops.padding(torch.arange(1000).view(2, 500) % 3 > 0),
    "by head and row": ops.dense(torch.arange(2 * 6 * 300 * 500).view(2, 6, 300, 500) % 7 > 2),
}


def sparse_layout(lengths, block, heads, share=0.5):
    made = torch.Generator().manual_seed(heads)
    grid = ops.full_layout(*lengths, block).grid
    return ops.from_map(torch.rand(2, heads, *grid, generator=made) < share, block, lengths)


def native_and_reference(function):
    with ops.backend("native"):
        got = function()
    with ops.backend("reference"):
        return got, function()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dim", [40, 64])
def test_masks_within_blocks(mask, dim):
    q, k, v = qkv(300, 500, q_heads=6, dim=dim, v_dim=dim + 8)
    layout = sparse_layout((300, 500), (32, 64), 6)
    for causal in (True, False):
        assert_same(
            *native_and_reference(
                lambda c=causal: ops.block_sparse(
                    q, k, v, layout, mask=mask, causal=c, return_lse=True
                )
            )
        )


@pytest.mark.parametrize("block", [(1, 64), (3, 1), (16, 16), (64, 256), (100, 48)])
@pytest.mark.parametrize("heads", [6, 2, 1])
def test_blocks_of_every_size(block, heads):
    q, k, v = qkv(300, 500, q_heads=6, dim=32, v_dim=32)
    layout = sparse_layout((300, 500), block, heads)
    assert_same(
        *native_and_reference(
            lambda: ops.block_sparse(q, k, v, layout, softcap=5.0, return_lse=True)
        )
    )


@pytest.mark.parametrize("dim", [8, 128, 256])
@pytest.mark.parametrize("lengths", [(1, 1), (65, 65), (7, 400), (200, 130)])
def test_dense_head_dims_and_lengths(dim, lengths):
    q, k, v = qkv(*lengths, dim=dim, v_dim=dim)
    causal = lengths[0] <= lengths[1]
    assert_same(*native_and_reference(lambda: ops.attend(q, k, v, causal=causal, return_lse=True)))


def test_bfloat16_is_computed_in_float32():
    q, k, v = qkv(200, 200, dim=64, v_dim=64, dtype=torch.bfloat16)
    out, lse = ops.attend(q, k, v, causal=True, return_lse=True)
    exact = ops.attend(*(x.float() for x in (q, k, v)), causal=True, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact[0].bfloat16())
    assert_same(lse, exact[1])


def test_strided_input_is_read_in_place():
    q, k, v = qkv(120, 200, dim=32, v_dim=32)
    far = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not far[0].is_contiguous()
    assert torch.equal(ops.attend(*far, causal=True), ops.attend(q, k, v, causal=True))


def test_what_is_not_finite_stays_in_its_row():
    q, k, v = qkv(100, 100, dim=32, v_dim=32)
    q[0, 1, 70] = float("nan")
    out, lse = ops.attend(q, k, v, causal=True, return_lse=True)
    hurt = torch.zeros(2, 4, 100, dtype=torch.bool)
    hurt[0, 1, 70] = True
    assert torch.equal(out.isnan().all(-1), hurt)
    assert torch.equal(out.isnan().any(-1), hurt)
    assert torch.equal(lse.isnan(), hurt)


def test_strong_logits():
    q, k, v = qkv(100, 130, dim=32, v_dim=32)
    got = ops.attend(q, k, v, causal=True, scale=1e4, return_lse=True)
    with ops.backend("reference"):
        wide = (x.double() for x in (q, k, v))
        want = ops.attend(*wide, causal=True, scale=1e4, return_lse=True)
    # Logits near 1e5 are rounded to 0.01, so where two nearly tie the weights differ by as much.
    torch.testing.assert_close(got[1].double(), want[1], atol=0, rtol=1e-6)
    assert got[0].isfinite().all()


@pytest.mark.parametrize("q_len", [1, 64], ids=["decode", "prefill"])
def test_error_does_not_grow_with_the_number_of_keys(q_len):
    q, k, v = qkv(q_len, 32_768, batch=1, q_heads=2, kv_heads=1, dim=64, v_dim=64)
    k[:, :, 0] += 3 * q.mean((1, 2))  # most weight comes first, then many small ones
    got = ops.attend(q, k, v)
    with ops.backend("reference"):
        want = ops.attend(*(x.double() for x in (q, k, v)))
    assert (got - want).norm() < 1e-6 * want.norm()


def test_several_python_threads_at_once():
    q, k, v = qkv(256, 256, dim=64, v_dim=64)
    want = ops.attend(q, k, v, causal=True)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ops.attend(q, k, v, causal=True), range(16)))
    assert all(torch.equal(out, want) for out in results)


def test_odd_head_dim_and_gradients_go_to_torch():
    q, k, v = qkv(50, 50, dim=12, v_dim=12)
    with ops.backend("reference"):
        want = ops.attend(q, k, v, causal=True)
    assert_same(ops.attend(q, k, v, causal=True), want)
    q, k, v = qkv(50, 50, grad=True)
    ops.attend(q, k, v, causal=True).sum().backward()
    assert q.grad is not None


def test_lists_without_a_slot_read_nothing():
    q, k, v = qkv(4, 4, dim=8, v_dim=8)
    empty = torch.zeros(1, 1, 1, 0, dtype=torch.int32)
    layout = ops.BlockLayout(empty, torch.zeros(1, 1, 1, dtype=torch.int32), (4, 4), (4, 4))
    for out, lse in (
        ops.block_sparse(q, k, v, layout, return_lse=True),
        ops.gather(q, k, v, empty.long(), return_lse=True),
    ):
        assert not out.any()
        assert torch.isneginf(lse).all()
