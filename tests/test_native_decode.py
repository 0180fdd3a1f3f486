"""The CPU kernel of few queries over long or listed keys, held to float64 softmax."""

import math

import pytest
import torch

from foveate import ops
from foveate.native import kernels
from foveate.native.decode import decode
from ops_tools import TOLERANCE, assert_same, held_to_reference

pytestmark = pytest.mark.skipif(kernels() is None, reason="there are no CPU kernels to test")

# batch, query heads, kv heads, queries, keys, head dims; 2500 keys are cut into several tasks.
SHAPES = [
    (1, 9, 3, 1, 100, 64, 64),
    (2, 8, 2, 3, 2500, 40, 72),
    (1, 4, 4, 8, 9, 16, 8),
    (2, 32, 1, 2, 1100, 24, 128),
    (1, 6, 3, 1, 1, 8, 8),
    (1, 2, 1, 4, 1300, 7, 5),
]


def drawn(shape, dtype=torch.float32):
    b, hq, hkv, lq, lk, d, dv = shape
    make = torch.Generator().manual_seed(lk)
    sizes = ((b, hq, lq, d), (b, hkv, lk, d), (b, hkv, lk, dv))
    return [torch.randn(s, generator=make).to(dtype) for s in sizes]


def runs_of(q_len, k_len, kind):
    end = torch.arange(k_len - q_len + 1, k_len + 1)
    first = (end - 70).clamp_min(0) if kind == "window" else torch.zeros_like(end)
    return torch.stack((first, end), -1).int()[None, None]


def plain(q, k, v, runs, softcap=None):
    """Every row by itself, in float64."""
    b, hq, lq, d = q.shape
    out = torch.zeros(b, hq, lq, v.shape[3], dtype=torch.float64)
    lse = torch.full((b, hq, lq), -math.inf, dtype=torch.float64)
    runs = runs.expand(b, hq, lq, 2)
    for i, h, t in torch.cartesian_prod(*(torch.arange(n) for n in (b, hq, lq))).tolist():
        first, end = runs[i, h, t].tolist()
        kv = h // (hq // k.shape[1])
        s = k[i, kv, first:end].double() @ q[i, h, t].double() * d**-0.5
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if first < end:
            out[i, h, t] = torch.softmax(s, 0) @ v[i, kv, first:end].double()
            lse[i, h, t] = torch.logsumexp(s, 0)
    return out, lse


def run(q, k, v, runs, softcap=None):
    return decode(kernels(), q, k, v, runs, scale=q.shape[3] ** -0.5, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["causal", "window"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_of_keys_is_read_exactly(shape, kind, dtype):
    q, k, v = drawn(shape, dtype)
    runs = runs_of(shape[3], shape[4], kind)
    for softcap in (None, 1.5):
        out, lse = run(q, k, v, runs, softcap)
        assert out.dtype == dtype and lse.dtype == torch.float32
        want = plain(q, k, v, runs, softcap)
        assert_same(out.double(), want[0], dtype)
        assert_same(lse.double(), want[1])


def test_without_runs_all_keys_are_read():
    q, k, v = drawn(SHAPES[1])
    everything = torch.tensor([0, 2500], dtype=torch.int32).expand(1, 1, 3, 2)
    assert_same(run(q, k, v, None), plain(q, k, v, everything))


def test_every_batch_row_and_head_has_its_own_run():
    q, k, v = drawn(SHAPES[1])
    ends = torch.randint(0, 2501, (2, 8, 3), generator=torch.Generator().manual_seed(0))
    runs = torch.stack((ends // 3, ends), -1).int()
    assert_same(run(q, k, v, runs), plain(q, k, v, runs))


def test_a_row_without_keys_gives_zero():
    q, k, v = drawn(SHAPES[1])
    runs = runs_of(3, 2500, "causal").clone()
    runs[0, 0, 1] = torch.tensor([7, 7])
    out, lse = run(q, k, v, runs)
    assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -math.inf).all()
    assert_same((out, lse), plain(q, k, v, runs))
    out, lse = run(q, k[:, :, :0], v[:, :, :0], None)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_stays_in_the_rows_that_see_it(which):
    q, k, v = drawn((1, 4, 2, 3, 1100, 16, 16))
    {"k": k, "v": v}[which][0, 0, 1098] = math.nan
    out, _ = run(q, k, v, runs_of(3, 1100, "causal"))
    bad = out.isnan().any(-1)[0]
    # Kv head 0 serves query heads 0 and 1; the first of the three queries ends before the key.
    assert bad[:2].tolist() == [[False, True, True]] * 2
    assert not bad[2:].any()


def test_strong_logits_do_not_overflow():
    q, k, v = drawn(SHAPES[0])
    runs = runs_of(1, 100, "causal")
    out, lse = run(q * 1e4, k, v, runs)
    want = plain(q * 1e4, k, v, runs)
    assert_same(out.double(), want[0])
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=0)


def strided(x, kind):
    """The same numbers in other places."""
    if kind == "rows of all heads side by side":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 8), math.nan, dtype=x.dtype)
    wide[:, :, 1:-2, 4:-4] = x
    return wide[:, :, 1:-2, 4:-4]


@pytest.mark.parametrize("kind", ["rows of all heads side by side", "part of a larger tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(kind, dtype):
    q, k, v = drawn(SHAPES[1], dtype)
    runs = runs_of(3, 2500, "window")
    got = run(*(strided(x, kind) for x in (q, k, v)), runs)
    assert all(torch.equal(a, b) for a, b in zip(got, run(q, k, v, runs), strict=True))


def test_the_number_of_threads_does_not_matter():
    q, k, v = drawn(SHAPES[1])
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(q, k, v, None))
    finally:
        torch.set_num_threads(threads)
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def listed(shape, heads, rows, count, width):
    make = torch.Generator().manual_seed(count)
    blocks = -(-shape[4] // width)
    idx = torch.randint(0, blocks, (shape[0], heads, rows, count), generator=make)
    return idx, torch.rand(idx.shape, generator=make) < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 16])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[5], (1, 4, 2, 40, 90, 24, 16)])
def test_lists_are_read_as_the_reference_reads_them(shape, width, dtype):
    q, k, v = drawn(shape, dtype)
    for heads in {1, shape[2], shape[1]}:
        for rows in {1, shape[3]}:
            idx, valid = listed(shape, heads, rows, 30, width)
            for seen in (None, valid):
                with ops.backend("native"):
                    got = ops.gather(q, k, v, idx, seen, width=width, return_lse=True)
                with ops.backend("reference"):
                    want = ops.gather(q, k, v, idx, seen, width=width, return_lse=True)
                assert_same(got, want, dtype)


def test_long_lists_are_cut_among_tasks():
    q, k, v = drawn(SHAPES[1])
    idx, valid = listed(SHAPES[1], 2, 3, 2100, 1)
    held_to_reference(ops.gather, q, k, v, idx, valid, return_lse=True)
    held_to_reference(ops.gather, q, k, v, idx.int()[:1], softcap=2.0, return_lse=True)


def test_invalid_entries_are_not_read():
    q, k, v = drawn((1, 2, 1, 1, 50, 16, 16))
    v[:, :, 3] = math.nan
    idx = torch.tensor([3, 7, 9]).view(1, 1, 1, 3)
    out, lse = ops.gather(q, k, v, idx, idx != 3, return_lse=True)
    want = ops.gather(q, k, v, idx[..., 1:], return_lse=True)
    tol = TOLERANCE[torch.float32]
    torch.testing.assert_close((out, lse), want, rtol=tol, atol=tol)
