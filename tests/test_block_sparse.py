import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from ops_tools import (
    assert_same,
    held_to_reference,
    held_when_strong,
    kept_for_backward,
    largest_output,
    qkv,
)
from test_attend import masks


@pytest.fixture(autouse=True, scope="module", params=[0, 1 << 20], ids=["by_block", "at_once"])
def pairs(request):
    """Both ways of PyTorch: block by block, and all logits of few pairs at once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(import_module("foveate.ops.block_sparse"), "_FEW", request.param)
        yield


LENGTHS = [(32, 32), (20, 20), (7, 20), (1, 20), (45, 70)]
BLOCKS = [(8, 8), (4, 6), (16, 8), (1, 5)]


def random_layout(lengths, block, batch=1, heads=1, share=0.5, seed=0):
    nq = ops.TileGrid.of(*lengths, block[0]).tiles
    make = torch.Generator().manual_seed(seed)
    chosen = torch.rand(batch, heads, nq, -(-lengths[1] // block[1]), generator=make) < share
    return ops.from_map(chosen, block, lengths)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("block", BLOCKS)
def test_full_layout_is_dense_attention(block, lengths, causal):
    q, k, v = qkv(*lengths)
    layout = ops.full_layout(*lengths, block, is_causal=causal)
    got = held_to_reference(ops.block_sparse, q, k, v, layout, causal=causal, return_lse=True)
    assert_same(got, ops.attend(q, k, v, causal=causal, return_lse=True))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("lists", [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("block", BLOCKS)
def test_chosen_blocks_are_read_exactly(block, lengths, lists, grad):
    layout = random_layout(lengths, block, *lists)
    for v_dim in (8, 5):
        q, k, v = qkv(*lengths, v_dim=v_dim, grad=grad)
        held_to_reference(ops.block_sparse, q, k, v, layout, return_lse=True)


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (6, 2)])
def test_every_grouping_of_heads(heads):
    q, k, v = qkv(45, 70, q_heads=heads[0], kv_heads=heads[1])
    for lists in {1, heads[1], heads[0]}:
        layout = random_layout((45, 70), (8, 8), 2, lists)
        held_to_reference(ops.block_sparse, q, k, v, layout, return_lse=True)


@pytest.mark.parametrize("lists", [(1, 1), (2, 2), (2, 4)])
@pytest.mark.parametrize("name", masks(20))
def test_masks_apply_inside_the_blocks(name, lists):
    q, k, v = qkv(45, 70)
    mask = masks(70)[name]
    layout = random_layout((45, 70), (8, 8), *lists, share=0.7)
    for causal in (True, False):
        held_to_reference(
            ops.block_sparse, q, k, v, layout, mask=mask, causal=causal, return_lse=True
        )


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("name", masks(20))
def test_layout_of_a_mask_gives_attention_under_it(name, joined):
    """Also when the layout, and so its `partial`, was made without the causality asked for."""
    q, k, v = qkv(45, 70)
    mask = masks(70)[name]
    layout = (mask & ops.causal() if joined else mask).to_layout(45, 70, 8)
    got = ops.block_sparse(q, k, v, layout, mask=mask, causal=True, return_lse=True)
    assert_same(got, ops.attend(q, k, v, mask=mask, causal=True, return_lse=True))


@pytest.mark.parametrize("pairs", [0], indirect=True, ids=["by_block"])
def test_partial_saves_looking_into_full_blocks():
    looked = []
    band = ops.window(500)
    spy = ops.Mask(lambda *at: looked.append(at[2].shape[0]) or band(*at))
    q, k, v = qkv(64, 64)
    layout = band.to_layout(64, 64, 8)
    ops.block_sparse(q, k, v, layout, mask=spy, causal=False)
    assert sum(looked) == 0


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(LENGTHS),
    st.sampled_from(BLOCKS),
    st.sampled_from([(1, 1), (1, 4), (2, 2)]),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_any_layout_is_read_exactly(lengths, block, lists, share, seed):
    q, k, v = qkv(*lengths)
    layout = random_layout(lengths, block, *lists, share=share, seed=seed)
    held_to_reference(ops.block_sparse, q, k, v, layout, mask=ops.sinks(9) | ops.window(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 45, 70), (1, 4, 1, 70), (1, 1, 45, 1), (1, 1, 1, 70)])
def test_bias_and_softcap_change_the_logits(dtype, shape):
    q, k, v = qkv(45, 70, dtype=dtype)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for lists in (1, 2, 4):
        layout = random_layout((45, 70), (8, 8), 1, lists)
        for options in ({"bias": bias.to(dtype)}, {"softcap": 2.0}, {"scale": -3.0}):
            held_to_reference(ops.block_sparse, q, k, v, layout, return_lse=True, **options)


def test_empty_rows_give_zero():
    q, k, v = qkv(32, 32, grad=True)
    chosen = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    chosen[..., 2, 0] = chosen[..., 3, 3] = True
    layout = ops.from_map(chosen, 8, (32, 32))
    out, lse = ops.block_sparse(q, k, v, layout, return_lse=True)
    assert (out[:, :, :16] == 0).all() and (lse[:, :, :16] == -math.inf).all()
    assert lse[:, :, 16:].isfinite().all()
    (out.sum() + lse[:, :, 16:].sum()).backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    nothing = ops.from_map(torch.zeros_like(chosen), 8, (32, 32))
    assert (ops.block_sparse(q, k, v, nothing) == 0).all()


@pytest.mark.parametrize("grad", [False, True])
def test_strong_logits_stay_finite(grad):
    layout = random_layout((45, 70), (8, 8))
    held_when_strong(
        lambda q, k, v, **strong: ops.block_sparse(q, k, v, layout, return_lse=True, **strong),
        (45, 70),
        grad,
    )


def test_halves_of_the_keys_merge_to_the_whole():
    q, k, v = qkv(64, 64)
    mask = ops.window(20) | ops.sinks(3)
    want = ops.attend(q, k, v, mask=mask, causal=True, return_lse=True)
    parts = []
    for at in (torch.arange(0, 64, 2), torch.arange(1, 64, 2)):
        whole = ops.full_layout(64, 32, 8, is_causal=False)
        part = ops.block_sparse(
            q, k[:, :, at], v[:, :, at], whole, mask=mask, causal=True,
            q_pos=torch.arange(64), k_pos=at, return_lse=True,
        )  # fmt: skip
        parts.append(part)
    assert_same(ops.merge(parts), want)


def test_positions_may_differ_by_batch_row():
    q, k, v = qkv(12, 30)
    make = torch.Generator().manual_seed(0)
    k_pos = torch.stack([torch.randperm(30, generator=make) for _ in range(2)])
    q_pos = torch.stack([torch.randperm(30, generator=make)[:12] for _ in range(2)])
    layout = ops.full_layout(12, 30, 8, is_causal=False)
    for mask in (None, ops.window(9)):
        held_to_reference(
            ops.block_sparse, q, k, v, layout, mask=mask, q_pos=q_pos, k_pos=k_pos, return_lse=True
        )


@pytest.mark.parametrize("lists", [1, 2])
def test_gradients_are_exact(lists):
    q, k, v = qkv(5, 7, batch=1, q_heads=2, kv_heads=1, dim=3, v_dim=2, dtype=torch.float64)
    bias = torch.randn(1, 2, 5, 7, dtype=torch.float64)
    layout = random_layout((5, 7), (2, 3), 1, lists, share=0.8)

    def attend(q, k, v, bias):
        out, lse = ops.block_sparse(q, k, v, layout, bias=bias, softcap=3.0, return_lse=True)
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (q, k, v, bias)])


@pytest.mark.parametrize("grad", [False, True])
def test_no_square_tensor_is_made_or_kept(grad):
    length = 4096
    q, k, v = qkv(length, length, batch=1, q_heads=1, kv_heads=1, grad=grad)
    layout = ops.full_layout(length, length, 64)
    assert largest_output(lambda: ops.block_sparse(q, k, v, layout)) <= length * length // 4
    if grad:
        # Lists of keys are gathered again backward, so even a full layout keeps O(L·D).
        kept = kept_for_backward(lambda: ops.block_sparse(q, k, v, layout))
        assert kept <= length * length // 64


def test_repeated_calls_are_bitwise_equal():
    q, k, v = qkv(45, 70)
    layout = random_layout((45, 70), (8, 8), 2, 4)
    assert torch.equal(ops.block_sparse(q, k, v, layout), ops.block_sparse(q, k, v, layout))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layout": random_layout((32, 32), (8, 8))}, ValueError, r"layout is for .*\(32, 32\)"),
        (
            {"layout": random_layout((45, 70), (8, 8), 3, 1)},
            ValueError,
            r"layout has .* \(3, 1\); wanted batch 1 or 2",
        ),
        (
            {"layout": random_layout((45, 70), (8, 8), 1, 3)},
            ValueError,
            r"layout has .* \(1, 3\); wanted .* heads 1, 2 or 4",
        ),
        ({"mask": ops.window(torch.tensor([1, 2]))}, ValueError, "mask window.* heads 1 or 4"),
        ({"bias": torch.ones(45, 70)}, ValueError, r"bias must .*\(45, 70\)"),
        ({"softcap": -1}, ValueError, "softcap must be positive, got -1"),
        ({"q_pos": torch.arange(3)}, ValueError, r"q_pos must be \(45,\)"),
    ],
)
def test_bad_input_is_named(options, error, words):
    q, k, v = qkv(45, 70)
    options = {"layout": random_layout((45, 70), (8, 8))} | options
    with pytest.raises(error, match=words):
        ops.block_sparse(q, k, v, **options)
