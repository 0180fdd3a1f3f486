import math

import pytest
import torch

from foveate import ops
from foveate.native import kernels
from foveate.native.quantized import serves
from ops_tools import largest_output

BACKENDS = ["torch"] if kernels() is None else ["torch", "native"]
# The kernel rounds queries and weights to 16 bits.
TOLERANCE = {"torch": 3e-5, "native": 4e-4}

# batch, query heads, kv heads, queries, keys, head dims; 2528 keys are cut into several tasks.
SHAPES = [
    (1, 9, 3, 1, 96, 64, 64),
    (2, 8, 2, 3, 2528, 64, 96),
    (1, 4, 4, 8, 32, 32, 128),
    (2, 4, 1, 2, 160, 128, 48),
]
GROUPS = {"whole rows": 0, "channels of a token": (1, 32), "tokens of a channel": (32, 1)}


def drawn(shape, dtype=torch.float32):
    b, hq, hkv, lq, lk, d, dv = shape
    make = torch.Generator().manual_seed(lk)
    sizes = ((b, hq, lq, d), (b, hkv, lk, d), (b, hkv, lk, dv))
    return [torch.randn(s, generator=make).to(dtype) for s in sizes]


def packed(x, bits, group):
    return ops.quantize(x, bits, group=group or x.shape[-1])


def exact(q, k, v, bits, groups, **options):
    """Dense attention over everything dequantised, by the reference."""
    k, v = (
        ops.dequantize(x, n, group=g or x.codes.shape[-1] * 8 // n).to(q.dtype)
        for x, n, g in zip((k, v), bits, groups, strict=True)
    )
    with ops.backend("reference"):
        return ops.attend(q, k, v, return_lse=True, **options)


def close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and not a.isnan().any()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (8, 8), (2, 8), (4, 2), (3, 4)])
@pytest.mark.parametrize("k_group", GROUPS)
@pytest.mark.parametrize("v_group", GROUPS)
@pytest.mark.parametrize("shape", [(1, 9, 3, 1, 96, 64, 64), (2, 4, 2, 3, 1056, 32, 96)])
def test_it_is_attention_over_the_dequantised(shape, k_group, v_group, bits, backend):
    q, k, v = drawn(shape)
    groups = GROUPS[k_group], GROUPS[v_group]
    k, v = (packed(x, n, g) for x, n, g in zip((k, v), bits, groups, strict=True))
    options = {"causal": True} if shape[3] > 1 else {"softcap": 2.0, "scale": 0.3}
    with ops.backend(backend):
        got = ops.attend_quantized(
            q, k, v, k_bits=bits[0], v_bits=bits[1], return_lse=True, **options
        )
    close(got, exact(q, k, v, bits, groups, **options), TOLERANCE[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 9, 65, 1027])
@pytest.mark.parametrize("dims", [(16, 16), (48, 80), (128, 96), (24, 40)])
def test_ragged_lengths_and_odd_dims(dims, length, backend):
    q, k, v = drawn((2, 6, 2, 1, length, *dims))
    for bits in (2, 4, 8):
        parts = packed(k, bits, 0), packed(v, bits, 0)
        with ops.backend(backend):
            got = ops.attend_quantized(q, *parts, k_bits=bits, v_bits=bits, return_lse=True)
        close(got, exact(q, *parts, (bits, bits), (0, 0)), TOLERANCE[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_far_from_zero_keep_their_precision(backend):
    q, k, v = drawn(SHAPES[1])
    k, v = k * 0.1 + 3, v * 0.1 - 5
    for group in GROUPS.values():
        parts = packed(k, 4, group), packed(v, 4, group)
        with ops.backend(backend):
            got = ops.attend_quantized(q, *parts, k_bits=4, v_bits=4, return_lse=True)
        close(got, exact(q, *parts, (4, 4), (group, group)), TOLERANCE[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_strong_key_among_many_weak_ones(backend):
    q, k, v = drawn(SHAPES[1])
    k[:, :, 1000] = 4 * q[:, ::4, 0]
    parts = packed(k, 8, 0), packed(v, 8, 0)
    with ops.backend(backend):
        got = ops.attend_quantized(q, *parts, k_bits=8, v_bits=8, return_lse=True)
    close(got, exact(q, *parts, (8, 8), (0, 0)), 5 * TOLERANCE[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coded", [0, 32, 1024, 2464])
@pytest.mark.parametrize("tokens", [1, 2, 130])
def test_exact_tokens_follow_the_codes(tokens, coded, dtype, backend):
    batch, q_heads, kv_heads, queries, _, *dims = SHAPES[1]
    q, k, v = drawn((batch, q_heads, kv_heads, queries, coded + tokens, *dims), dtype)
    parts = packed(k[:, :, :coded], 8, (32, 1)), packed(v[:, :, :coded], 4, 0)
    tail = k[:, :, coded:], v[:, :, coded:]
    whole = [
        torch.cat((ops.dequantize(x, bits, group=group), y.float()), 2)
        for x, bits, group, y in zip(parts, (8, 4), ((32, 1), 96), tail, strict=True)
    ]
    options = {"causal": coded + tokens >= queries, "scale": 0.2}
    with ops.backend("reference"):
        want = ops.attend(q.float(), *whole, return_lse=True, **options)
    with ops.backend(backend):
        got = ops.attend_quantized(
            q, *parts, k_bits=8, v_bits=4, exact=tail, return_lse=True, **options
        )
        merged = ops.merge(
            [
                ops.attend_quantized(q[:, :, -1:], *parts, k_bits=8, v_bits=4, return_lse=True),
                ops.attend(q[:, :, -1:], *tail, return_lse=True),
            ]
        )
        last = ops.attend_quantized(q[:, :, -1:], *parts, k_bits=8, v_bits=4, exact=tail)
    assert got[0].dtype == dtype
    close(got[1:], want[1:], TOLERANCE[backend])
    options = {"rtol": torch.finfo(dtype).eps, "atol": TOLERANCE[backend], "check_dtype": False}
    torch.testing.assert_close(got[0], want[0], **options)
    torch.testing.assert_close(
        last, merged[0], **options | {"atol": 2e-6 if dtype.itemsize == 4 else 1e-2}
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    q, k, v = drawn(SHAPES[1])
    parts = [packed(x, 4, (1, 32)) for x in (k, v)]
    # As a cache holds them: tokens before heads.
    moved = [
        ops.Quantized(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in x)) for x in parts
    ]
    with ops.backend(backend):
        got = ops.attend_quantized(q, *moved, k_bits=4, v_bits=4)
        assert torch.equal(got, ops.attend_quantized(q, *parts, k_bits=4, v_bits=4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_no_keys(backend):
    q, k, v = drawn(SHAPES[0], torch.bfloat16)
    parts = packed(k, 4, 0), packed(v, 4, 0)
    with ops.backend(backend):
        out, lse = ops.attend_quantized(q, *parts, k_bits=4, v_bits=4, return_lse=True)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        want = ops.attend_quantized(q.float(), *parts, k_bits=4, v_bits=4, return_lse=True)
        close((out.float(), lse), want, 4e-3)
        none = [ops.Quantized(*(t[:, :, :0] for t in x)) for x in parts]
        out, lse = ops.attend_quantized(q, *none, k_bits=4, v_bits=4, return_lse=True)
        assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", GROUPS.values())
def test_nan_stays_in_the_rows_that_see_it(group, backend):
    q, k, v = drawn((1, 4, 2, 2, 96, 32, 32))
    q[0, 1, 1] = math.nan
    v[0, 1, 95, 3] = math.nan
    parts = packed(k, 4, group), packed(v, 4, group)
    with ops.backend(backend):
        out = ops.attend_quantized(q, *parts, k_bits=4, v_bits=4, causal=True)
    bad = out.isnan().any(-1)[0]
    assert bad[:2].tolist() == [[False, False], [False, True]]
    # The last query sees the broken token; the one before shares at most its group.
    assert bad[2:, 1].all() and (group == (32, 1) or backend == "torch" or not bad[2:, 0].any())


def test_queries_have_gradients():
    q, k, v = drawn((1, 2, 1, 2, 32, 8, 8), torch.float64)
    parts = packed(k, 4, 0), packed(v, 4, 0)

    def call(q):
        return ops.attend_quantized(
            q, *parts, k_bits=4, v_bits=4, causal=True, softcap=3.0, return_lse=True
        )

    assert torch.autograd.gradcheck(call, [q.requires_grad_()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cache_is_never_dequantised_as_a_whole(backend):
    tokens = 1 << 16
    q, k, v = drawn((1, 2, 2, 1, tokens, 32, 32))
    parts = packed(k, 4, 0), packed(v, 4, 0)
    with ops.backend(backend):
        largest = largest_output(lambda: ops.attend_quantized(q, *parts, k_bits=4, v_bits=4))
    assert largest <= tokens * 2 * 32 // 4


def test_the_kernel_says_what_it_serves():
    assert serves(4, (1, 64), 64) and serves(2, (1, 32), 128) and serves(8, (32, 1), 80)
    assert not serves(3, (1, 64), 64)
    assert not serves(4, (1, 16), 64)
    assert not serves(4, (8, 8), 64)
    assert not serves(4, (1, 24), 24)


def without(x, part, value):
    return x._replace(**{part: value})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k_bits": 5}, ValueError, "k_bits must be one of"),
        ({"k_bits": 8}, ValueError, "head dim of k is 32 at 8 bits, that of q is 64"),
        ({"k": 3}, TypeError, "k must be what ops.quantize returns, got int"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"q": torch.zeros(2, 64)}, ValueError, r"q must be floating .* \(2, 64\)"),
        ({"q": torch.zeros(1, 5, 1, 64)}, ValueError, "5 query heads do not divide"),
        ({"q": torch.zeros(2, 9, 1, 64)}, ValueError, "do not fit together"),
        ({"q": torch.zeros(1, 9, 97, 64), "causal": True}, ValueError, "97 queries and only 96"),
        ({"v": "short"}, ValueError, "must match"),
        ({"v": "scale"}, ValueError, "do not fit together"),
        ({"v": "dtype"}, ValueError, "v.zero must be .* torch.int16"),
        ({"exact": (torch.zeros(1, 3, 2, 64), torch.zeros(1, 3, 1, 64))}, ValueError, "exact v"),
        ({"exact": (torch.zeros(1, 3, 2, 48), torch.zeros(1, 3, 2, 64))}, ValueError, "exact k"),
        ({"exact": [torch.zeros(1, 3, 2, 64).half()] * 2}, ValueError, "exact k .*float16"),
    ],
)
def test_bad_input_is_named(change, error, words):
    q, k, v = drawn(SHAPES[0])
    k, v = packed(k, 4, 0), packed(v, 4, 0)
    broken = {
        "short": ops.Quantized(*(t[:, :, :9] for t in v)),
        "scale": without(v, "scale", v.scale[:, :, :9]),
        "dtype": without(v, "zero", v.zero.float()),
    }
    given = {"q": q, "k": k, "v": v, "k_bits": 4, "v_bits": 4} | change
    if isinstance(given["v"], str):
        given["v"] = broken[given["v"]]
    with pytest.raises(error, match=words):
        ops.attend_quantized(given.pop("q"), given.pop("k"), given.pop("v"), **given)
