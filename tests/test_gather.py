import math

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

LENGTHS = [(20, 20), (7, 23), (1, 23)]


def lists(k_len, shape, width=1, seed=0):
    """Distinct entries per list, and which of them count."""
    make = torch.Generator().manual_seed(seed)
    blocks = -(-k_len // width)
    order = torch.rand(*shape[:3], blocks, generator=make).argsort(-1)
    idx = order[..., : shape[3]]
    return idx, torch.rand(idx.shape, generator=make) < 0.7


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_listed_tokens_are_read_exactly(lengths, heads, width, grad):
    for v_dim in (8, 5):
        q, k, v = qkv(*lengths, v_dim=v_dim, grad=grad)
        for batch in (1, 2):
            for rows in {1, lengths[0]}:
                idx, valid = lists(lengths[1], (batch, heads, rows, 5), width)
                for seen in (None, valid):
                    held_to_reference(ops.gather, q, k, v, idx, seen, width=width, return_lse=True)


@pytest.mark.parametrize("width", [1, 4])
def test_listing_everything_is_dense_attention(width):
    q, k, v = qkv(7, 23)
    idx = torch.arange(-(-23 // width)).flip(0).view(1, 1, 1, -1)
    got = ops.gather(q, k, v, idx, width=width, return_lse=True)
    assert_same(got, ops.attend(q, k, v, return_lse=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 7, 23), (1, 4, 1, 23), (2, 1, 7, 1), (1, 1, 1, 23)])
def test_bias_and_softcap_change_the_logits(dtype, shape):
    q, k, v = qkv(7, 23, dtype=dtype)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for rows in (1, 7):
        for heads in (1, 2, 4):
            idx, valid = lists(23, (1, heads, rows, 5))
            for options in ({"bias": bias.to(dtype)}, {"softcap": 2.0}, {"scale": 3.0}):
                held_to_reference(ops.gather, q, k, v, idx, valid, return_lse=True, **options)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(LENGTHS),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(0, 10**6),
)
def test_any_lists_are_read_exactly(lengths, heads, width, count, seed):
    q, k, v = qkv(*lengths)
    idx, valid = lists(lengths[1], (2, heads, lengths[0], count), width, seed)
    held_to_reference(ops.gather, q, k, v, idx, valid, width=width, return_lse=True)


def test_a_token_listed_twice_counts_twice():
    q, k, v = qkv(3, 9)
    idx = torch.tensor([2, 5, 2]).view(1, 1, 1, 3)
    held_to_reference(ops.gather, q, k, v, idx, return_lse=True)


@pytest.mark.parametrize("count", [0, 4])
def test_empty_lists_give_zero(count):
    q, k, v = qkv(7, 23, grad=True)
    idx, _ = lists(23, (1, 2, 7, count))
    valid = torch.zeros_like(idx, dtype=torch.bool)
    out, lse = ops.gather(q, k, v, idx, valid, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    if count:
        out.sum().backward()
        assert (v.grad == 0).all() and q.grad.isfinite().all()


@pytest.mark.parametrize("grad", [False, True])
def test_strong_logits_stay_finite(grad):
    idx, valid = lists(23, (1, 4, 7, 9))
    held_when_strong(
        lambda q, k, v, **strong: ops.gather(q, k, v, idx, valid, return_lse=True, **strong),
        (7, 23),
        grad,
    )


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_are_exact(rows):
    q, k, v = qkv(4, 7, batch=1, q_heads=2, kv_heads=1, dim=3, v_dim=2, dtype=torch.float64)
    bias = torch.randn(1, 2, 4, 7, dtype=torch.float64)
    idx, valid = lists(7, (1, 2, rows, 2), 3)
    valid[..., 0] = True

    def attend(q, k, v, bias):
        return ops.gather(q, k, v, idx, valid, width=3, bias=bias, softcap=3.0, return_lse=True)

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (q, k, v, bias)])


@pytest.mark.parametrize("grad", [False, True])
def test_no_square_tensor_is_made_or_kept(grad):
    length = 4096
    q, k, v = qkv(length, length, batch=1, q_heads=2, kv_heads=1, grad=grad)
    idx = torch.randint(0, length, (1, 1, length, 64), generator=torch.Generator().manual_seed(0))
    assert largest_output(lambda: ops.gather(q, k, v, idx)) <= length * length // 16
    if grad:
        # The lists themselves are kept, not the keys and values they point to.
        kept = kept_for_backward(lambda: ops.gather(q, k, v, idx))
        assert kept <= idx.numel() + length * length // 64


def test_repeated_calls_are_bitwise_equal():
    q, k, v = qkv(7, 23)
    idx, valid = lists(23, (2, 4, 7, 9))
    assert torch.equal(ops.gather(q, k, v, idx, valid), ops.gather(q, k, v, idx, valid))


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"idx": zeros(7, 5)}, ValueError, r"idx must be .* got torch.int64 \(7, 5\)"),
        ({"idx": torch.zeros(1, 1, 7, 5)}, ValueError, "idx must be .* got torch.float32"),
        ({"idx": zeros(3, 1, 7, 5)}, ValueError, r"idx has .* \(3, 1\); wanted batch 1 or 2"),
        ({"idx": zeros(1, 3, 7, 5)}, ValueError, "wanted batch 1 or 2 and heads 1, 2 or 4"),
        ({"idx": zeros(1, 1, 2, 5)}, ValueError, r"idx has 2 lists; wanted 1 or 7"),
        ({"idx": zeros(1, 1, 7, 5) + 23}, ValueError, r"idx must lie in \[0, 23\), got \[23, 23\]"),
        ({"idx": zeros(1, 1, 7, 5) - 1}, ValueError, r"idx must lie in \[0, 23\), got \[-1, -1\]"),
        ({"idx": zeros(1, 1, 7, 5) + 6, "width": 4}, ValueError, r"idx must lie in \[0, 6\)"),
        ({"width": 0}, ValueError, "width must be at least 1, got 0"),
        ({"valid": torch.ones(1, 1, 7, 5)}, ValueError, "valid must be a bool .* torch.float32"),
        ({"valid": torch.ones(1, 1, 7, 4).bool()}, ValueError, r"valid .* \(1, 1, 7, 4\)"),
        ({"bias": torch.ones(7, 23)}, ValueError, r"bias must .*\(7, 23\)"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    ],
)
def test_bad_input_is_named(options, error, words):
    q, k, v = qkv(7, 23)
    options = {"idx": zeros(1, 1, 7, 5)} | options
    with pytest.raises(error, match=words):
        ops.gather(q, k, v, **options)
