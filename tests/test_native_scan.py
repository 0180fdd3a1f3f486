import functools
import math
import sys

import pytest
import torch

from foveate import native, ops
from ops_tools import assert_same
from scan_tools import VARIANTS, law, scan_terms

pytestmark = pytest.mark.skipif(
    native.isa() == "none", reason="the CPU kernels are off or not installed"
)
API = sys.modules["foveate.ops.scan.api"]
SIZES = [(8, 8), (24, 72), (64, 64), (136, 40), (256, 256)]


@pytest.fixture(params=native.runnable())
def isa(request, monkeypatch):
    monkeypatch.setenv("FOVEATE_ISA", request.param)


@pytest.fixture
def served(monkeypatch, isa):
    """Calls are served by the kernel or fail."""

    def refuse(*_):
        raise AssertionError("the kernel did not serve this call")

    monkeypatch.setattr(API, "scan_chunk", refuse)
    monkeypatch.setattr(API, "scan_recurrent", refuse)
    return ops.scan


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@functools.cache
def case(variant, length, **sizes):
    """Terms, and the result of the token loop."""
    tensors, options = scan_terms(variant, length, **sizes)
    return tensors, options, law(*tensors, **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernel_is_the_token_loop(variant, size, isa, threads):
    for length in (1, 16, 21):
        tensors, options, want = case(variant, length, dim=size[0], v_dim=size[1])
        assert_same(ops.scan(*tensors, **options), want)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grouped_heads(variant, heads, isa, threads):
    tensors, options, want = case(variant, 20, batch=1, q_heads=heads[0], kv_heads=heads[1])
    assert_same(ops.scan(*tensors, **options), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16(variant, isa):
    tensors, options = scan_terms(variant, 37, dtype=torch.bfloat16)
    out, state = ops.scan(*tensors, **options)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    want = law(*tensors, **options)
    assert_same(state, want[1])
    assert_same(out, want[0].bfloat16(), torch.bfloat16)


@pytest.mark.parametrize("size", [-10.0, -200.0, -1e4, -math.inf])
@pytest.mark.parametrize("variant", ["per token", "per key channel", "per value channel"])
def test_strong_decay(variant, size, isa):
    tensors, options = scan_terms(variant, 37)
    for at in (slice(None), slice(9, 10)):
        options["decay"][:, :, at] = size
        assert_same(ops.scan(*tensors, **options), law(*tensors, **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_leaves_no_trace(variant, isa):
    (q, k, v), options = scan_terms(variant, 50)
    valid = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    want = law(q, k, v, **options, valid=valid)
    padded = ~valid[:, None, :, None]
    q, k, v = (x.masked_fill(padded, math.nan) for x in (q, k, v))
    got = ops.scan(q, k, v, **options, valid=valid)
    assert_same(got, want)
    assert (got[0].masked_select(padded) == 0).all()
    turned = valid.T.contiguous().T
    assert_same(ops.scan(q, k, v, **options, valid=turned), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_strides(variant, isa):
    tensors, options = scan_terms(variant, 20)
    want = law(*tensors, **options)

    def turn(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    turned = {
        name: turn(x) if torch.is_tensor(x) and x.dim() > 1 else x for name, x in options.items()
    }
    assert_same(ops.scan(*(turn(x) for x in tensors), **turned), want)


def test_expanded_heads_and_batches(isa):
    (q, k, v), options = scan_terms("gated delta", 20, batch=1, kv_heads=1)
    k, v = (x.expand(3, 4, -1, -1) for x in (k, v))
    options = {name: x.expand(3, 4, *x.shape[2:]) for name, x in options.items()}
    q = q.expand(3, -1, -1, -1)
    assert_same(ops.scan(q, k, v, **options), law(q, k, v, **options))


def test_nan_stays_in_its_head_and_its_future(isa):
    (q, k, v), options = scan_terms("gated delta", 20)
    clean = ops.scan(q, k, v, **options)
    v[0, 1, 7, 3] = math.nan
    out, state = ops.scan(q, k, v, **options)
    assert out[0, 2:, 7:, 3].isnan().all() and state[0, 1, :, 3].isnan().all()
    out[0, 2:, 7:], state[0, 1] = clean[0][0, 2:, 7:], clean[1][0, 1]
    assert torch.equal(out, clean[0]) and torch.equal(state, clean[1])


def test_two_parts_are_the_whole_and_the_state_given_is_kept(isa):
    (q, k, v), options = scan_terms("gated delta", 50)
    whole = ops.scan(q, k, v, **options)
    state = options.pop("state")
    before, outs = state.clone(), []
    for at in (slice(0, 21), slice(21, 50)):
        part = {name: x[:, :, at] for name, x in options.items()}
        out, after = ops.scan(*(x[:, :, at] for x in (q, k, v)), **part, state=state)
        if not outs:
            assert torch.equal(state, before)
        outs.append(out)
        state = after
    assert torch.equal(torch.cat(outs, 2), whole[0]) and torch.equal(state, whole[1])


def test_number_of_threads_changes_nothing(isa):
    (q, k, v), options = scan_terms("delta", 30, batch=1, q_heads=1, kv_heads=1, dim=64, v_dim=64)
    first = ops.scan(q, k, v, **options)
    torch.set_num_threads(4)
    try:
        again = ops.scan(q, k, v, **options)
    finally:
        torch.set_num_threads(1)
    assert_same(again, first)


def test_plain_calls_are_served(served):
    for variant in VARIANTS:
        tensors, options = scan_terms(variant, 20)
        served(*tensors, **options)
        served(*(x.bfloat16() for x in tensors), **options)
    with torch.no_grad():
        served(*(x.requires_grad_() for x in tensors), **options)


def test_what_it_cannot_serve_runs_on_torch(isa, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the kernel served this call")

    monkeypatch.setattr(API, "scan_kernel", refuse)
    for sizes in ({"dim": 12}, {"v_dim": 20}, {"dim": 264}, {"dtype": torch.float64}):
        tensors, options = scan_terms("gated delta", 9, **sizes)
        got = ops.scan(*tensors, **options)
        assert_same(got, law(*tensors, **options))
    tensors, options = scan_terms("gated delta", 9)
    options["decay"].requires_grad_()
    assert ops.scan(*tensors, **options)[0].requires_grad
    options["decay"].requires_grad_(False)
    ops.scan(*(x.mT.contiguous().mT for x in tensors), **options)
    for form in ("recurrent", "parallel"):
        ops.scan(*tensors, **options, form=form)
    with ops.backend("torch"):
        ops.scan(*tensors, **options)
