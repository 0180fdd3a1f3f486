import math

import pytest
import torch

from foveate import ops
from ops_tools import (
    assert_same,
    held_to_reference,
    held_when_strong,
    kept_for_backward,
    largest_output,
    qkv,
)

LENGTHS = [(20, 20), (7, 20), (1, 20), (300, 300), (270, 601)]
HEADS = {"multi head": (2, 2), "groups of 2": (4, 2), "one kv head": (3, 1)}


def masks(k_len, heads=4, batch=2):
    """One mask of every kind and of their mixtures; some leave rows empty."""
    make = torch.Generator().manual_seed(k_len)
    real = torch.arange(k_len) >= torch.tensor([[0], [k_len // 3]])
    documents = torch.randint(0, 2, (batch, k_len), generator=make).cumsum(-1)
    sizes = torch.tensor([2, 5, 9, 400])[:heads]
    table = torch.rand(batch, heads, k_len, k_len, generator=make) < 0.5
    return {
        "window": ops.window(6),
        "window per head": ops.window(sizes),
        "sinks": ops.sinks(3) & ~ops.sinks(1),
        "documents": ops.documents(documents),
        "padding": ops.padding(real),
        "dense": ops.dense(table),
        "mixture": (ops.sinks(sizes) | ops.window(4) | ops.documents(documents))
        & ops.padding(real)
        & ~ops.dense(table),
        "nothing": ops.window(1) & ~ops.window(1),
    }


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", HEADS)
def test_unmasked_attention_is_the_definition(heads, lengths, causal, grad):
    q_heads, kv_heads = HEADS[heads]
    for v_dim in (8, 5):
        q, k, v = qkv(*lengths, q_heads=q_heads, kv_heads=kv_heads, v_dim=v_dim, grad=grad)
        out, _ = held_to_reference(ops.attend, q, k, v, causal=causal, return_lse=True)
        assert out.shape == (2, q_heads, lengths[0], v_dim)
        assert_same(ops.attend(q, k, v, causal=causal), out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", masks(20))
def test_masked_attention_is_the_definition(name, lengths, causal):
    mask = masks(lengths[1])[name]
    for v_dim in (8, 5):
        q, k, v = qkv(*lengths, v_dim=v_dim)
        held_to_reference(ops.attend, q, k, v, mask=mask, causal=causal, return_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 7, 20), (1, 4, 1, 20), (1, 1, 7, 1), (1, 1, 1, 20)])
def test_bias_and_softcap_change_the_logits(dtype, shape):
    q, k, v = qkv(7, 20, dtype=dtype)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for options in ({"bias": bias}, {"softcap": 2.0}, {"bias": bias, "softcap": 2.0, "scale": 3.0}):
        for mask in (None, ops.window(6)):
            held_to_reference(
                ops.attend, q, k, v, mask=mask, causal=True, return_lse=True, **options
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_other_precisions(dtype, grad):
    q, k, v = qkv(270, 300, dtype=dtype, grad=grad)
    for mask in (None, ops.window(40)):
        out, lse = held_to_reference(ops.attend, q, k, v, mask=mask, causal=True, return_lse=True)
        assert out.dtype == dtype
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_bias_keeps_its_precision_under_bf16_queries():
    q, k, v = (x.bfloat16() for x in qkv(4, 64))
    bias = (1000 + torch.arange(64) * 0.01).expand(1, 1, 1, 64)
    _, lse = ops.attend(q, k, v, bias=bias, return_lse=True)
    with ops.backend("reference"):
        _, want = ops.attend(q, k, v, bias=bias, return_lse=True)
    assert_same(lse, want)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "relu"])
def test_rows_that_see_nothing_give_zero(normalizer, grad):
    q, k, v = qkv(20, 20, grad=grad)
    nothing = ops.padding(torch.arange(20) >= 15)
    out = ops.attend(q, k, v, mask=nothing, causal=True, normalizer=normalizer)
    assert (out[:, :, :15] == 0).all() and (out[:, :, 15:] != 0).any()
    if normalizer == "softmax":
        _, lse = ops.attend(q, k, v, mask=nothing, causal=True, return_lse=True)
        assert (lse[:, :, :15] == -math.inf).all() and lse[:, :, 15:].isfinite().all()
    if grad:
        out.sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_gradient_of_lse_is_finite_where_rows_are_empty():
    q, k, v = qkv(6, 6, grad=True)
    parts = [
        ops.attend(
            q,
            k[:, :, at],
            v[:, :, at],
            causal=True,
            q_pos=torch.arange(6),
            k_pos=torch.arange(6)[at],
            return_lse=True,
        )
        for at in (slice(0, 3), slice(3, 6))
    ]
    out, lse = ops.merge(parts)
    (out.sum() + lse.sum()).backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    out, lse = ops.attend(q, k, v, causal=True, return_lse=True)
    (out.sum() + lse.sum()).backward()
    assert_same(got, [x.grad for x in (q, k, v)])


@pytest.mark.parametrize("q_len", [0, 3])
def test_no_keys_or_no_queries(q_len):
    q, k, v = qkv(q_len, 0 if q_len else 5)
    for mask in (None, ops.window(2)):
        out, lse = ops.attend(q, k, v, mask=mask, return_lse=True)
        assert out.shape == (2, 4, q_len, 8)
        assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("grad", [False, True])
def test_strong_logits_stay_finite(grad):
    held_when_strong(
        lambda *x, **strong: ops.attend(*x, causal=True, return_lse=True, **strong), (20, 300), grad
    )
    plain = ops.attend(*qkv(20, 20, grad=grad), causal=True, scale=-1e4)
    assert plain.isfinite().all()


def test_masked_leading_keys_do_not_poison_later_ones():
    q, k, v = qkv(4, 1500)
    held_to_reference(ops.attend, q, k, v, mask=~ops.sinks(1400), return_lse=True)


@pytest.mark.parametrize("grad", [False, True])
def test_striped_shards_merge_to_the_whole(grad):
    q, k, v = qkv(40, 40, grad=grad)
    mask = ops.window(9) | ops.sinks(2)
    want = ops.attend(q, k, v, mask=mask, causal=True, return_lse=True)
    stripes = [torch.arange(n, 40, 3) for n in range(3)]
    parts = [
        ops.attend(
            q, k[:, :, at], v[:, :, at], mask=mask, causal=True,
            q_pos=torch.arange(40), k_pos=at, return_lse=True,
        )
        for at in stripes
    ]  # fmt: skip
    assert_same(ops.merge(parts), want)
    rows = [
        ops.attend(q[:, :, at], k, v, mask=mask, causal=True, q_pos=at, return_lse=True)
        for at in stripes
    ]
    for at, (out, lse) in zip(stripes, rows, strict=True):
        assert_same((out, lse), (want[0][:, :, at], want[1][:, :, at]))


def test_positions_may_differ_by_batch_row_and_come_in_any_order():
    q, k, v = qkv(12, 300)
    make = torch.Generator().manual_seed(0)
    k_pos = torch.stack([torch.randperm(300, generator=make) for _ in range(2)])
    q_pos = torch.stack([torch.randperm(300, generator=make)[:12] for _ in range(2)])
    held_to_reference(
        ops.attend,
        q,
        k,
        v,
        mask=ops.window(50),
        causal=True,
        q_pos=q_pos,
        k_pos=k_pos,
        return_lse=True,
    )


def test_cross_attention_may_have_more_queries_than_keys():
    q, k, v = qkv(20, 7)
    held_to_reference(ops.attend, q, k, v, return_lse=True)
    with pytest.raises(ValueError, match="20 queries and only 7 keys"):
        ops.attend(q, k, v, causal=True)


@pytest.mark.parametrize("v_dim", [4, 3])
def test_gradients_are_exact(v_dim):
    q, k, v = qkv(3, 5, q_heads=2, kv_heads=1, dim=4, v_dim=v_dim, dtype=torch.float64, grad=True)
    bias = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = ops.window(3)

    def masked(q, k, v, bias):
        return ops.attend(q, k, v, mask=mask, causal=True, bias=bias, softcap=3.0, return_lse=True)

    assert torch.autograd.gradcheck(masked, (q, k, v, bias))
    assert torch.autograd.gradcheck(lambda *x: ops.attend(*x, causal=True), (q, k, v))
    assert torch.autograd.gradcheck(
        lambda *x: ops.attend(*x, causal=True, normalizer="sigmoid"), (q, k, v)
    )


@pytest.mark.parametrize("dim", [(8, 8), (8, 4)])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"mask": ops.window(64)}, {"normalizer": "sigmoid"}])
def test_no_square_tensor_is_made_or_kept(options, grad, dim):
    length = 4096
    q, k, v = qkv(
        length, length, batch=1, q_heads=1, kv_heads=1, dim=dim[0], v_dim=dim[1], grad=grad
    )

    def call():
        return ops.attend(q, k, v, causal=True, **options)

    assert largest_output(call) <= length * length // 16
    if grad:
        assert kept_for_backward(call) <= length * length // 64


def test_a_window_reads_only_its_span():
    read = []
    band = ops.window(64)
    spy = ops.Mask(lambda *at: read.append(at[3].shape[-1]) or band(*at), band.bounds)
    q, k, v = qkv(2048, 2048, batch=1, q_heads=1, kv_heads=1)
    ops.attend(q, k, v, mask=spy, causal=True)
    assert max(read) <= 256 + 2 * 128


def test_repeated_calls_are_bitwise_equal():
    q, k, v = qkv(40, 40)
    first, again = (ops.attend(q, k, v, mask=ops.window(9), causal=True) for _ in range(2))
    assert torch.equal(first, again)


def test_transposed_inputs_need_not_be_contiguous():
    q, k, v = qkv(20, 20)
    turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    flipped = (x.mT.contiguous().mT for x in (q, k, v))
    want = ops.attend(q, k, v, causal=True)
    assert_same(ops.attend(*turned, causal=True), want)
    assert_same(ops.attend(*flipped, causal=True), want)


def attend(q=(2, 4, 5, 8), k=(2, 2, 6, 8), v=(2, 2, 6, 8), **options):
    return ops.attend(torch.ones(q), torch.ones(k), torch.ones(v), **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: attend(q=(4, 5, 8)), ValueError, r"q must be \(batch.*\), got \(4, 5, 8\)"),
        (lambda: attend(k=(1, 2, 6, 8)), ValueError, "batch sizes differ: q 2, k 1, v 2"),
        (lambda: attend(k=(2, 2, 6, 7)), ValueError, "head dim of k is 7, that of q is 8"),
        (lambda: attend(v=(2, 2, 5, 8)), ValueError, r"v has .* \(2, 5\), k \(2, 6\)"),
        (lambda: attend(q=(2, 5, 5, 8)), ValueError, "5 query heads .* over 2 kv heads"),
        (lambda: attend(mask=torch.ones(5, 6).bool()), TypeError, "mask must be .* got Tensor"),
        (
            lambda: attend(mask=ops.window(torch.tensor([1, 2]))),
            ValueError,
            r"mask window.* is for .* \(1, 2\); wanted .* heads 1 or 4",
        ),
        (
            lambda: attend(mask=ops.padding(torch.ones(3, 6).bool())),
            ValueError,
            r"mask padding.* \(3, 1\); wanted batch 1 or 2",
        ),
        (lambda: attend(bias=torch.ones(5, 6)), ValueError, r"bias must .* got .*\(5, 6\)"),
        (lambda: attend(bias=torch.ones(1, 2, 5, 6)), ValueError, r"bias must .*\(1, 2, 5, 6\)"),
        (lambda: attend(bias=torch.ones(1, 1, 1, 1).int()), ValueError, "bias must .* torch.int32"),
        (lambda: attend(softcap=0), ValueError, "softcap must be positive, got 0"),
        (lambda: attend(normalizer="soft"), ValueError, "normalizer 'soft'; known: softmax, "),
        (lambda: attend(q_pos=torch.arange(6)), ValueError, r"q_pos must be \(5,\)"),
        (lambda: attend(k_pos=torch.arange(6.0)), TypeError, "k_pos must be an integer"),
        (lambda: attend(k_pos=torch.zeros(3, 6).long()), ValueError, "k_pos has batch 3"),
        (
            lambda: attend(normalizer="relu", return_lse=True),
            ValueError,
            "relu has no log-sum-exp: return_lse must be off",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_bad_types_are_named():
    q, k, v = qkv(5, 5)
    with pytest.raises(TypeError, match=r"q must be a floating-point tensor, got torch\.int64"):
        ops.attend(q.long(), k, v)
    with pytest.raises(TypeError, match="v must be a floating-point tensor, got list"):
        ops.attend(q, k, [1.0])
    with pytest.raises(ValueError, match=r"k is torch\.float64 .* q is torch\.float32"):
        ops.attend(q, k.double(), v)
