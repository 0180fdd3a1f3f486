from itertools import pairwise

import pytest
import torch

import foveate
from attached import check_equals_plain, check_padded_row_equals_row_alone
from foveate import ops
from foveate.attention.base import Call
from foveate.attention.decode.lean import attend_run, fuse, plan

LENGTHS = [[100], [0], [7, 0, 64, 33, 1], [1000, 10, 10, 10], [5] * 9]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_every_key_is_covered_once_and_loads_differ_by_at_most_a_tile(lengths, workers):
    runs = plan(lengths, 16, workers)
    seen = [torch.zeros(n) for n in lengths]
    loads = []
    for run in runs:
        for problem, start, stop in run:
            assert start < stop
            seen[problem][start:stop] += 1
        loads.append(sum(-(-(p.stop - p.start) // 16) for p in run))
    assert len(runs) == workers and all(bool((x == 1).all()) for x in seen)
    assert max(loads) - min(loads) <= 1


def test_runs_are_contiguous_in_the_order_of_the_problems():
    order = [piece for run in plan([40, 100, 3], 8, 4) for piece in run]
    assert order == sorted(order)
    # A worker enters a problem in the middle only where the one before it stopped.
    assert all(a.stop == b.start for a, b in pairwise(order) if a.problem == b.problem)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("q_len", "causal"), [(1, True), (4, True), (4, False)])
def test_ragged_rows_equal_dense_whatever_the_workers(workers, q_len, causal):
    torch.manual_seed(0)
    lengths = [33, 0, 70, 5]
    q, k, v = (torch.randn(4, h, n, 8) for h, n in ((4, q_len), (2, 70), (2, 70)))
    problems = [n for n in lengths for _ in range(2)]
    runs = plan(problems, 16, workers)
    call = Call(causal=causal)
    out, lse = fuse(q, v, [attend_run(q, k, v, lengths, run, call) for run in runs])
    for b, n in enumerate(lengths):
        if n == 0:
            assert not out[b].any() and torch.isneginf(lse[b]).all()
            continue
        own = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        want, sums = ops.attend(*own, causal=causal, return_lse=True)
        torch.testing.assert_close(out[b : b + 1], want, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse[b : b + 1], sums, atol=1e-6, rtol=1e-5)


def test_the_mechanism_equals_dense():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 90, 8), torch.randn(2, 2, 90, 8)
    for workers in (1, 4, 13):
        out = foveate.create("lean", tile=8, workers=workers)(q, k, v)
        torch.testing.assert_close(out, ops.attend(q, k, v), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        foveate.create("lean", **options)
    with pytest.raises(ValueError, match=message):
        plan([3], **{"tile": 1, "workers": 1, **options})
    with pytest.raises(ValueError, match="lengths must be at least 0"):
        plan([3, -1], 1, 1)


def test_inside_a_model_it_equals_the_plain_one(tiny_llama):
    check_equals_plain(tiny_llama, decode="lean:tile=5,workers=3")
    check_padded_row_equals_row_alone(tiny_llama, 3, decode="lean:tile=5,workers=3")
