import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from ops_tools import TOLERANCE, assert_same, kept_for_backward, largest_output, qkv

LENGTHS = [1, 2, 16, 17, 33, 100]


def draw(*shape, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)


def loop(x, g, h0=None, dim=-2):
    """The recurrence step by step, in float64."""
    x, g = x.double().movedim(dim, 0), g.double().expand(x.shape).movedim(dim, 0)
    h, steps = torch.zeros_like(x[0]) if h0 is None else h0.double(), []
    for t in range(len(x)):
        h = g[t].exp() * h + x[t]
        steps.append(h)
    return torch.stack(steps).movedim(0, dim), h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
def test_elementwise_scan_is_its_loop(length, dtype):
    x, g = draw(2, length, 5, dtype=dtype), -3 * draw(2, length, 1, seed=1).abs().to(dtype)
    for h0 in (None, draw(2, 5, seed=2)):
        h, last = ops.elementwise_scan(x, g, h0)
        assert h.dtype == dtype
        assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        want = loop(x, g, h0)
        assert_same(h, want[0], dtype)
        assert_same(last, want[1], torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_any_axis_may_be_time(dim):
    x, g = draw(20, 18, 19), -draw(20, 18, 19, seed=1).abs()
    assert_same(ops.elementwise_scan(x, g, dim=dim), loop(x, g, dim=dim), torch.float64)


@pytest.mark.parametrize("size", [-3.0, -200.0, -1e4, -math.inf])
def test_strong_decay_and_resets_stay_exact(size):
    x, g = draw(2, 75, 3, dtype=torch.float32), torch.zeros(2, 75, 3)
    for at in (slice(None), slice(40, 41), slice(0, None, 2)):
        g[:, at] = size
        g.requires_grad_()
        got = ops.elementwise_scan(x, g)
        assert_same(got, loop(x, g))
        assert torch.autograd.grad(got[0].sum(), g)[0].isfinite().all()
        g = g.detach().zero_()


def test_scan_gradients_are_exact():
    x, g, h0 = draw(2, 19, 2), -draw(2, 19, 1, seed=1).abs(), draw(2, 2, seed=2)
    inputs = [t.requires_grad_() for t in (x, g, h0)]
    assert torch.autograd.gradcheck(ops.elementwise_scan, inputs)
    x, g, h0 = (t[:, :3].detach().requires_grad_() for t in (x, g, h0))
    assert torch.autograd.gradgradcheck(ops.elementwise_scan, (x, g, h0))


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(0, 40))
def test_two_parts_are_the_whole(cut):
    x, g = draw(2, 40, 3), -draw(2, 40, 3, seed=1).abs()
    first, h = ops.elementwise_scan(x[:, :cut], g[:, :cut])
    second, h = ops.elementwise_scan(x[:, cut:], g[:, cut:], h)
    want = ops.elementwise_scan(x, g)
    assert_same((torch.cat((first, second), 1), h), want, torch.float64)


def test_scan_memory_is_linear():
    x, g = draw(4096, 2).requires_grad_(), -draw(4096, 2, seed=1).abs()
    assert largest_output(lambda: ops.elementwise_scan(x, g)) <= 2 * 4096
    assert kept_for_backward(lambda: ops.elementwise_scan(x, g)) <= 3 * 2 * 4096


def softmax_averages(s, v):
    """Softmax averages of v over every prefix, zeros where a prefix is empty."""
    logits = s.mT[..., None, :].expand(*s.mT.shape, s.shape[-2])  # (…, channels, T, T)
    above = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(above, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("...cij,...jc->...ic", weights, v)


def with_gaps(dtype=torch.float64):
    """Scores with padding at the start, in the middle, at the end, and everywhere."""
    s = 3 * draw(4, 30, 2, dtype=dtype)
    s[0, :9] = s[1, 11:14] = s[2, 20:] = s[3] = -math.inf
    return s


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gate_gives_softmax_averages_of_all_prefixes(dtype):
    s, v = with_gaps(dtype), draw(4, 30, 2, seed=1, dtype=dtype)
    w, g, z = ops.prefix_softmax_gate(s)
    assert w.dtype == g.dtype == z.dtype == dtype
    assert_same(ops.elementwise_scan(w * v, g)[0], softmax_averages(s, v), dtype)
    assert_same(z, s.logsumexp(1), dtype)
    gone = s == -math.inf
    assert (w[gone] == 0).all() and (g[gone] == 0).all() and (g <= 0).all()


def test_gate_continues_from_what_came_before():
    s, v = with_gaps(), draw(4, 30, 2, seed=1)
    w, _, z = ops.prefix_softmax_gate(s)
    for cut in (0, 5, 13, 30):
        first = ops.prefix_softmax_gate(s[:, :cut])
        second = ops.prefix_softmax_gate(s[:, cut:], first[2])
        assert_same(torch.cat((first[0], second[0]), 1), w, torch.float64)
        assert_same(second[2], z, torch.float64)
        h, state = ops.elementwise_scan(first[0] * v[:, :cut], first[1])
        late, _ = ops.elementwise_scan(second[0] * v[:, cut:], second[1], state)
        assert_same(torch.cat((h, late), 1), softmax_averages(s, v), torch.float64)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_gate_weights_sum_to_one_at_large_scores(size):
    s = size * draw(1, 200, 3, dtype=torch.float32)
    w, g, _ = ops.prefix_softmax_gate(s)
    assert ((w + g.exp())[:, 1:] - 1).abs().max() <= 2e-7
    average, _ = ops.elementwise_scan(w, g)
    assert (average - 1).abs().max() <= TOLERANCE[torch.float32]


def test_gate_gradients_are_exact():
    s, z0 = draw(2, 7, 2).requires_grad_(), draw(2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(ops.prefix_softmax_gate, (s, z0))
    s, v = with_gaps()[:, ::3], draw(4, 10, 2, seed=1)
    gaps = s == -math.inf

    def averages(s):
        w, g, z = ops.prefix_softmax_gate(s.masked_fill(gaps, -math.inf))
        return ops.elementwise_scan(w * v, g)[0], z[:3]

    assert torch.autograd.gradcheck(averages, draw(4, 10, 2).requires_grad_())


def global_reference(fq, fk, v, weight, normalize):
    group = fq.shape[1] // fk.shape[1]
    fk, v = (x.repeat_interleave(group, 1) for x in (fk, v))
    scores = fq @ fk.mT
    if weight is not None:
        scores = scores * weight.repeat_interleave(group, 1)[:, :, None]
    return (scores / (scores.sum(-1, keepdim=True) + 1e-6) if normalize else scores) @ v


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)])
def test_global_linear_attention_is_its_matrix(heads, weighted, normalize):
    fq, fk, v = qkv(7, 20, q_heads=heads[0], kv_heads=heads[1], v_dim=5, dtype=torch.float64)
    fq, fk = fq.exp(), fk.exp()
    weight = draw(2, heads[1], 20).exp() if weighted else None
    out = ops.linear_attention_global(fq, fk, v, weight, normalize)
    assert_same(out, global_reference(fq, fk, v, weight, normalize), torch.float64)
    if normalize:
        ones = ops.linear_attention_global(fq, fk, torch.ones_like(v), weight)
        assert_same(ones, torch.ones_like(ones), torch.float32)


def test_keys_of_weight_zero_are_padding():
    fq, fk, v = qkv(7, 20)
    fq, fk = fq.exp(), fk.exp()
    weight = (torch.arange(20) < 12).float().expand(2, 2, 20)
    want = ops.linear_attention_global(fq, fk[:, :, :12], v[:, :, :12])
    assert_same(ops.linear_attention_global(fq, fk, v, weight), want)
    assert (ops.linear_attention_global(fq, fk, v, 0 * weight) == 0).all()


def test_global_linear_attention_makes_no_square():
    fq, fk, v = qkv(2000, 2000, batch=1, q_heads=1, kv_heads=1)
    assert largest_output(lambda: ops.linear_attention_global(fq, fk, v)) <= 2000 * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_global_linear_attention_keeps_its_dtype(dtype):
    fq, fk, v = qkv(7, 20, dtype=dtype)
    out = ops.linear_attention_global(fq.exp(), fk.exp(), v)
    assert out.dtype == dtype
    want = global_reference(*(x.double() for x in (fq.exp(), fk.exp(), v)), None, True)
    assert_same(out, want, dtype)


def test_no_steps():
    x, g = torch.zeros(2, 0, 3), torch.zeros(2, 0, 3)
    h, last = ops.elementwise_scan(x, g, torch.ones(2, 3))
    assert h.shape == (2, 0, 3) and (last == 1).all()
    w, g, z = ops.prefix_softmax_gate(x)
    assert w.shape == g.shape == (2, 0, 3) and (z == -math.inf).all()


X = torch.ones(2, 5, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.elementwise_scan(X.long(), X), TypeError, "x must be .* got torch.int64"),
        (lambda: ops.elementwise_scan(X, 0.5), TypeError, "g must be .* got float"),
        (lambda: ops.elementwise_scan(X, X[:, :4]), ValueError, r"g must broadcast to x \(2, 5"),
        (lambda: ops.elementwise_scan(X, X[None]), ValueError, r"g must .* got \(1, 2, 5, 3\)"),
        (lambda: ops.elementwise_scan(X, X, X), ValueError, r"h0 must be \(2, 3\), got \(2, 5"),
        (lambda: ops.elementwise_scan(X, X, dim=3), ValueError, r"dim .* x \(2, 5, 3\), got 3"),
        (lambda: ops.prefix_softmax_gate(X.bool()), TypeError, "s must be .* got torch.bool"),
        (lambda: ops.prefix_softmax_gate(X, X), ValueError, r"z0 must be \(2, 3\), got \(2, 5"),
        (lambda: ops.prefix_softmax_gate(X, dim=-4), ValueError, r"dim .* s \(2, 5, 3\), got -4"),
        (
            lambda: ops.linear_attention_global(X[None], X[None], X[None], X),
            ValueError,
            r"key_weight must be \(1, 2, 5\), got \(2, 5, 3\)",
        ),
        (
            lambda: ops.linear_attention_global(X[None], X[None], X[None], X[:1, :2].long()),
            TypeError,
            "key_weight must be a floating-point tensor, got torch.int64",
        ),
        (lambda: ops.linear_attention_global(X, X, X), ValueError, r"q must be \(batch, heads"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
