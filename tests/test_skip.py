"""`skip` of `block_sparse`: blocks that turn out not to matter."""

import math
from importlib import import_module

import pytest
import torch

from foveate import ops
from ops_tools import TOLERANCE, held_to_reference, qkv


@pytest.fixture(autouse=True, scope="module")
def pairs():
    """The way of many pairs also for the few of these tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(import_module("foveate.ops.block_sparse"), "_FEW", 0)
        yield


def inputs(q_len=170, k_len=250, heads=6, block=(32, 16)):
    q, k, v = qkv(q_len, k_len, q_heads=6, dim=32, v_dim=32)
    made = torch.Generator().manual_seed(1)
    grid = ops.full_layout(q_len, k_len, block).grid
    layout = ops.from_map(torch.rand(2, heads, *grid, generator=made) < 0.7, block, (q_len, k_len))
    return 3 * q, k, v, layout


@pytest.mark.parametrize("rows", [1, 8, 16, 32])
@pytest.mark.parametrize("q_len", [170, 154])
@pytest.mark.parametrize("heads", [6, 2, 1])
def test_every_backend_skips_the_same(rows, q_len, heads):
    q, k, v, layout = inputs(q_len, heads=heads)
    skip = (1.0, rows)
    got = held_to_reference(ops.block_sparse, q, k, v, layout, skip=skip, return_lse=True)
    plain = ops.block_sparse(q, k, v, layout, return_lse=True)
    if rows <= 8:
        assert (got[0] - plain[0]).abs().max() > 0.05


def test_masks_and_the_first_block_of_a_row():
    q, k, v, layout = inputs()
    for mask in (ops.window(60), ops.strided(3)):
        held_to_reference(
            ops.block_sparse, q, k, v, layout, mask=mask, skip=(0.0, 16), return_lse=True
        )
    # The first block that a row sees is never skipped: no row that saw a key is left empty.
    _, lse = ops.block_sparse(q, k, v, layout, skip=(0.0, 1), return_lse=True)
    _, plain = ops.block_sparse(q, k, v, layout, return_lse=True)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(plain))


def test_an_endless_threshold_skips_nothing():
    q, k, v, layout = inputs()
    got = ops.block_sparse(q, k, v, layout, skip=(math.inf, 16))
    # The kernel takes keys block by block where it may skip, otherwise in chunks of its own.
    bound = TOLERANCE[torch.float32]
    torch.testing.assert_close(got, ops.block_sparse(q, k, v, layout), atol=bound, rtol=0)


def test_what_is_lost_is_bounded_by_the_threshold():
    q, k, v, layout = inputs()
    _, lse = ops.block_sparse(q, k, v, layout, skip=(4.0, 16), return_lse=True)
    _, plain = ops.block_sparse(q, k, v, layout, return_lse=True)
    seen = ~torch.isneginf(plain)
    # A skipped key weighs at most exp(-threshold) of a kept one.
    most = math.log1p(250 * math.exp(-4.0))
    assert (plain - lse)[seen].max() <= most
    assert (plain - lse)[seen].min() >= -1e-5


def test_gradients_pass_through_what_stays():
    q, k, v, layout = inputs()
    q.requires_grad_(True)
    ops.block_sparse(q, k, v, layout, skip=(1.0, 16)).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize("skip", [(-1.0, 16), (math.nan, 16), (1.0, 0), (1.0, 5)])
def test_bad_rules_are_refused(skip):
    q, k, v, layout = inputs()
    with pytest.raises(ValueError, match="skip"):
        ops.block_sparse(q, k, v, layout, skip=skip)
