import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import normalize

from foveate import ops
from memory_checks import loop

B, H, K = 2, 2, 4


def memory(depth, values=K, hidden=6, seed=0):
    made = torch.Generator().manual_seed(seed)
    sizes = [K, values] if depth == 1 else [K, *[hidden] * (depth - 1), K]
    return [
        torch.randn(H, a, b, generator=made, dtype=torch.float64) * 0.4 for a, b in pairwise(sizes)
    ]


def terms(length, values=K, seed=1):
    made = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, B, H, length, K, generator=made, dtype=torch.float64)
    v = torch.randn(B, H, length, values, generator=made, dtype=torch.float64)
    gates = torch.rand(3, B, H, length, generator=made, dtype=torch.float64)
    return q, normalize(k, dim=-1), v, gates[0] * 0.2, gates[1], 1 - gates[2] * 0.2


def scanned(given, weights, state=None, valid=None, **options):
    q, k, v, rate, momentum, keep = given
    state = ops.memory_start(weights, B) if state is None else state
    logs = {"log_momentum": momentum.log(), "log_keep": keep.log()}
    return ops.memory_scan(q, k, v, state, rate=rate, valid=valid, **logs, **options)


@pytest.mark.parametrize("read", ["lag", "token"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_is_the_token_loop(depth, chunk, read):
    given, weights = terms(11), memory(depth)
    got, state = scanned(given, weights, chunk=chunk, read=read)
    want, ends = loop(*given[:3], weights, *given[3:], chunk, read)
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)
    for i, (now, push) in enumerate(ends):
        for j in range(depth):
            at = (i // H, i % H)
            torch.testing.assert_close(state.now[j][at], now[j], atol=1e-11, rtol=1e-9)
            torch.testing.assert_close(state.momentum[j][at], push[j], atol=1e-11, rtol=1e-9)


def test_values_of_a_matrix_may_be_of_another_width():
    given, weights = terms(9, values=3), memory(1, values=3)
    got, _ = scanned(given, weights, chunk=4, read="token")
    want, _ = loop(*given[:3], weights, *given[3:], 4, "token")
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("read", ["lag", "token"])
@pytest.mark.parametrize("depth", [1, 2])
def test_handed_over_anywhere_it_goes_on(depth, read):
    given, weights = terms(11), memory(depth)
    want, last = scanned(given, weights, chunk=4, read=read)
    for cut in (1, 4, 6, 10):
        first, state = scanned([x[:, :, :cut] for x in given], weights, chunk=4, read=read)
        rest, state = scanned([x[:, :, cut:] for x in given], weights, state, chunk=4, read=read)
        torch.testing.assert_close(torch.cat((first, rest), 2), want, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(state.now, last.now, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("read", ["lag", "token"])
def test_padding_takes_no_step_and_rows_keep_their_own_chunks(read):
    given, weights = terms(20), memory(2)
    valid = torch.ones(B, 10, dtype=torch.bool)
    valid[1, 7:] = False
    _, state = scanned([x[:, :, :10] for x in given], weights, valid=valid, chunk=4, read=read)
    assert state.seen.tolist() == [10, 7]
    got, state = scanned([x[:, :, 10:] for x in given], weights, state, chunk=4, read=read)
    alone = [torch.cat((x[:, :, :7], x[:, :, 10:]), 2) for x in given]
    for row, whole in ((0, given), (1, alone)):
        want, last = scanned(whole, weights, chunk=4, read=read)
        torch.testing.assert_close(got[row], want[row, :, -10:], atol=1e-12, rtol=1e-10)
        for mine, other in zip(state.now, last.now, strict=True):
            torch.testing.assert_close(mine[row], other[row], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("read", ["lag", "token"])
def test_no_token_sees_a_later_one(read):
    given, weights = terms(11), memory(2)
    want, _ = scanned(given, weights, chunk=4, read=read)
    for t in (1, 5, 8):
        other = [x.clone() for x in given]
        for x in other:
            x[:, :, t:] = x[:, :, t:].flip(2) * 0.5
        got, _ = scanned(other, weights, chunk=4, read=read)
        torch.testing.assert_close(got[:, :, :t], want[:, :, :t], atol=0, rtol=1e-12)


def test_one_token_a_chunk_without_momentum_is_the_delta_rule():
    q, k, v, rate, _, _ = terms(11)
    weights = [torch.zeros_like(w) for w in memory(1)]
    start = ops.memory_start(weights, B)
    got, state = ops.memory_scan(q, k, v, start, rate=rate, chunk=1, read="token")
    want, last = ops.scan(q, k, v, beta=2 * rate, scale=1.0)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(state.now[0], last, atol=1e-12, rtol=1e-10)


def test_without_steps_the_memory_stays():
    q, k, v, rate, momentum, _ = terms(11)
    weights = memory(2)
    start = ops.memory_start(weights, B)
    _, state = ops.memory_scan(q, k, v, start, rate=0 * rate, log_momentum=momentum.log())
    torch.testing.assert_close(state.now, start.now, atol=0, rtol=0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_step_brings_the_answer_nearer_by_one_minus_twice_the_rate(rate):
    _, k, v, _, _, _ = terms(1)
    start = ops.memory_start(memory(1), B)
    steps = torch.full((B, H, 1), rate, dtype=torch.float64)
    _, state = ops.memory_scan(k, k, v, start, rate=steps)
    before, after = ((ops.memory_read(k, s.now) - v).norm(dim=-1) for s in (start, state))
    torch.testing.assert_close(after, abs(1 - 2 * rate) * before, atol=1e-12, rtol=1e-10)


def test_equal_keys_of_a_chunk_add_up_to_one_step():
    _, k, v, _, _, _ = terms(1)
    start = ops.memory_start(memory(1), B)
    k, v = (x.expand(-1, -1, 4, -1) for x in (k, v))
    quarter = torch.full((B, H, 4), 0.1, dtype=torch.float64)
    _, together = ops.memory_scan(k, k, v, start, rate=quarter, chunk=4)
    _, once = ops.memory_scan(
        k[:, :, :1], k[:, :, :1], v[:, :, :1], start, rate=4 * quarter[:, :, :1]
    )
    torch.testing.assert_close(together.now, once.now, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("read", ["lag", "token"])
def test_gradients_reach_everything(read):
    given, weights = terms(6), memory(2)
    inputs = [x.requires_grad_() for x in (*given, *weights)]

    def function(*x):
        out, state = scanned(x[:6], x[6:], chunk=2, read=read)
        return out, *state.now

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_gates_that_are_shut_give_no_nan():
    q, k, v, rate, _, _ = terms(9)
    shut = torch.full_like(rate, -math.inf)
    start = ops.memory_start(memory(2), B)
    out, state = ops.memory_scan(
        q, k, v, start, rate=rate, log_momentum=shut, log_keep=shut, read="token"
    )
    assert all(torch.isfinite(x).all() for x in (out, *state.now))


def test_half_precision_keeps_its_weights_in_float32():
    q, k, v, rate, momentum, keep = terms(9)
    weights = [w.bfloat16() for w in memory(2)]
    given = [x.bfloat16() for x in (q, k, v)]
    got, state = scanned((*given, rate, momentum, keep), weights, chunk=4)
    assert got.dtype == torch.bfloat16 and all(w.dtype == torch.float32 for w in state.now)
    want, _ = scanned((q, k, v, rate, momentum, keep), memory(2), chunk=4)
    torch.testing.assert_close(got.double(), want, atol=0.1, rtol=0.1)


def test_refuses_what_does_not_fit():
    q, k, v, rate, _, _ = terms(9)
    start = ops.memory_start(memory(1), B)
    deep = ops.memory_start([memory(1)[0], torch.randn(H, K, 3)], B)
    for options, message in (
        ({"read": "late"}, "read must be one of lag, token, got 'late'"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"rate": rate[:, :, :4]}, r"rate must be \(2, 2, 9\), got \(2, 2, 4\)"),
        ({"k": k[..., :3]}, r"k must be \(2, 2, 9, 4\), got \(2, 2, 9, 3\)"),
        ({"v": v[..., :3]}, r"matrix 0 of the memory must be \(2, 2, 4, 3\)"),
        ({"state": deep, "v": v[..., :3]}, "v must have 4 channels as k, got 3"),
        ({"valid": torch.ones(2, 4).bool()}, r"valid must be \(2, 9\), got \(2, 4\)"),
    ):
        given = {"q": q, "k": k, "v": v, "state": start, "rate": rate} | options
        with pytest.raises(ValueError, match=message):
            ops.memory_scan(**given)
    with pytest.raises(TypeError, match=r"k must be a floating-point tensor, got torch\.int64"):
        ops.memory_scan(q, k.long(), v, start, rate=rate)
