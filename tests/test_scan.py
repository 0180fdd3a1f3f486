import math
import sys
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from ops_tools import TOLERANCE, assert_same, kept_for_backward, largest_output
from scan_tools import VARIANTS, law, scan_terms

LENGTHS = [1, 7, 64, 75]
PLAIN = [name for name, (decay, _) in VARIANTS.items() if decay not in ("key", "value")]


def same_as_law(tensors, options, dtype=torch.float32, **form):
    """Outputs, states and gradients of the torch path are those of the token loop in float64."""
    sources = [x for x in (*tensors, *options.values()) if torch.is_tensor(x)]
    sources = [x for x in sources if x.is_floating_point()]
    for x in sources:
        x.requires_grad_()
    with ops.backend("torch"):
        got = ops.scan(*tensors, **options, **form)
    want = law(*tensors, **options)
    assert got[0].dtype == dtype
    assert got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(got, want, dtype)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in want]

    def gradients(out, state):
        total = (out * weights[0]).sum() + (state * weights[1]).sum()
        return torch.autograd.grad(total, sources)

    for got_grad, want_grad in zip(gradients(*got), gradients(*want), strict=True):
        size = want_grad.abs().max().clamp_min(1.0)
        assert_same(got_grad / size, want_grad / size, dtype)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_are_the_token_loop(variant, length):
    same_as_law(*scan_terms(variant, length), chunk=32)


@pytest.mark.parametrize("variant", PLAIN)
def test_parallel_form_is_the_token_loop(variant):
    same_as_law(*scan_terms(variant, 45), form="parallel")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_dtypes(variant, dtype):
    same_as_law(*scan_terms(variant, 45, dtype=dtype), dtype, chunk=16)


@pytest.mark.parametrize("chunk", [1, 8, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunk_size_changes_nothing(variant, chunk):
    same_as_law(*scan_terms(variant, 35), chunk=chunk)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grouped_heads_share_one_state(variant, heads):
    (q, k, v), options = scan_terms(variant, 20, q_heads=heads[0], kv_heads=heads[1])
    same_as_law((q, k, v), options)
    group = heads[0] // heads[1]
    repeated = {
        name: x.repeat_interleave(group, 0 if x.dim() == 1 else 1) if torch.is_tensor(x) else x
        for name, x in options.items()
    }
    want = ops.scan(q, *(x.repeat_interleave(group, 1) for x in (k, v)), **repeated)
    out, state = ops.scan(q, k, v, **options)
    assert_same((out, state.repeat_interleave(group, 1)), want)


def jumps(variant, at, size):
    """Terms with strong decays at some tokens."""
    tensors, options = scan_terms(variant, 75)
    options["decay"] = options["decay"].clone()
    options["decay"][:, :, at] = size
    return tensors, options


DECAYED = [name for name, (decay, _) in VARIANTS.items() if decay in ("token", "key", "value")]


@pytest.mark.parametrize("variant", DECAYED)
@pytest.mark.parametrize(
    ("at", "size"),
    [
        (slice(None), -10.0),
        (slice(None), -200.0),
        (slice(30, 31), -1e4),
        (slice(30, 31), -math.inf),
        (slice(3, None, 2), -math.inf),
    ],
)
def test_strong_decay_stays_exact(variant, at, size):
    same_as_law(*jumps(variant, at, size), chunk=64)


@pytest.mark.parametrize("variant", DECAYED)
def test_a_reset_forgets_all_before_it(variant):
    (q, k, v), options = jumps(variant, slice(30, 31), -math.inf)
    late = {
        name: x[:, :, 30:] if torch.is_tensor(x) and name != "state" else x
        for name, x in options.items()
    }
    for form in ("chunk", "recurrent"):
        out, state = ops.scan(q, k, v, **options, form=form)
        again = ops.scan(*(x[:, :, 30:] for x in (q, k, v)), **late | {"state": None}, form=form)
        assert_same((out[:, :, 30:], state), again)


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=5, deadline=None)
@given(cut=st.integers(0, 50))
def test_two_parts_are_the_whole(variant, form, cut):
    (q, k, v), options = scan_terms(variant, 50)
    whole = ops.scan(q, k, v, **options, form=form)
    outs, state = [], options.pop("state")
    for at in (slice(0, cut), slice(cut, 50)):
        part = {
            name: x[:, :, at] if torch.is_tensor(x) and x.dim() > 1 else x
            for name, x in options.items()
        }
        tensors = (x[:, :, at] for x in (q, k, v))
        out, state = ops.scan(*tensors, **part, state=state, form=form)
        outs.append(out)
    assert_same((torch.cat(outs, 2), state), whole)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_leaves_no_trace(variant, left, backend):
    (q, k, v), options = scan_terms(variant, 40)
    real = slice(15, 40) if left else slice(0, 25)
    valid = torch.zeros(2, 40, dtype=torch.bool)
    valid[:, real] = True
    alone = {
        name: x[:, :, real] if torch.is_tensor(x) and x.dim() > 1 and name != "state" else x
        for name, x in options.items()
    }
    with ops.backend(backend):
        want = ops.scan(*(x[:, :, real] for x in (q, k, v)), **alone)
        for x in (q, k, v, options.get("beta")):
            if x is not None:
                x[:, :, ~valid[0]] = math.nan
        out, state = ops.scan(q, k, v, **options, valid=valid)
        nothing = ops.scan(q, k, v, **options, valid=torch.zeros_like(valid))
    assert_same((out[:, :, real], state), want)
    assert (out[:, :, ~valid[0]] == 0).all()
    assert (nothing[0] == 0).all() and torch.equal(nothing[1], options["state"])


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_padding_gives_zero_also_after_a_nan(backend):
    (q, k, v), options = scan_terms("gated delta", 12)
    v[:, :, 3] = math.nan
    valid = torch.arange(12).expand(2, 12) != 7
    with nullcontext() if backend is None else ops.backend(backend):
        out, _ = ops.scan(q, k, v, **options, valid=valid)
    assert (out[:, :, 7] == 0).all() and out[:, :, 8:].isnan().all()


def test_gradients_stay_clear_of_padding():
    (q, k, v), options = scan_terms("gated delta", 12)
    valid = torch.arange(12).expand(2, 12) >= 5
    q[:, :, :5] = math.nan
    for x in (q, k, v):
        x.requires_grad_()
    with ops.backend("torch"):
        out, state = ops.scan(q, k, v, **options, valid=valid)
    (out.sum() + state.sum()).backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and (x.grad[:, :, :5] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_exact(variant):
    sizes = {"batch": 1, "q_heads": 2, "kv_heads": 1, "dim": 2, "v_dim": 3}
    tensors, options = scan_terms(variant, 3, dtype=torch.float64, **sizes)
    valid = torch.tensor([[False, True, True]])
    side = options.pop("side", None)
    inputs = [x.requires_grad_() for x in (*tensors, *options.values())]

    def call(q, k, v, *rest):
        given = dict(zip(options, rest, strict=True))
        return ops.scan(q, k, v, **given, side=side, valid=valid, chunk=2)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_is_linear_in_length(variant, monkeypatch):
    monkeypatch.setattr(sys.modules["foveate.ops.scan.chunk"], "_SLAB", 1 << 10)

    def made_and_kept(length):
        tensors, options = scan_terms(variant, length, batch=1, q_heads=1, kv_heads=1)
        for x in tensors:
            x.requires_grad_()

        def call():
            with ops.backend("torch"):
                return ops.scan(*tensors, **options, chunk=16)

        return largest_output(call), kept_for_backward(call)

    made, kept = made_and_kept(200)
    inputs = 200 * (16 + 16 + 24 + 24)
    # T×T would be 200 * 200, a state for every token 200 * 16 * 24.
    assert made <= 200 * 24 and kept <= 3 * inputs
    made_twice, kept_twice = made_and_kept(400)
    assert made_twice <= 2 * made and kept_twice <= 2.1 * kept


def test_rewriting_a_key_replaces_its_value():
    k = torch.eye(8)[[0, 1, 0]][None, None]
    v = torch.randn(1, 1, 3, 8)
    beta = torch.ones(1, 1, 3)
    _, state = ops.scan(k, k, v, beta=beta)
    assert_same(state[0, 0, :2], v[0, 0, [2, 1]])


def test_without_decay_it_is_masked_linear_attention():
    (q, k, v), _ = scan_terms("no decay", 33, q_heads=2)
    out, _ = ops.scan(q, k, v, scale=1.0)
    assert_same(out, (q @ k.mT).tril() @ v)


def test_equal_channels_decay_as_the_whole():
    (q, k, v), options = scan_terms("per token", 33)
    decay = options.pop("decay")
    want = ops.scan(q, k, v, **options, decay=decay)
    for side, channels in (("key", k.shape[3]), ("value", v.shape[3])):
        each = decay[..., None].expand(-1, -1, -1, channels)
        assert_same(ops.scan(q, k, v, **options, decay=each, side=side), want)


def test_gated_delta_rule_of_transformers():
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    (q, k, v), options = scan_terms("gated delta", 100, q_heads=2)
    turned = {
        "query": q, "key": k, "value": v, "g": options["decay"], "beta": options["beta"],
    }  # fmt: skip
    turned = {name: x.transpose(1, 2) for name, x in turned.items()}
    want, last = module.torch_chunk_gated_delta_rule(
        **turned, initial_state=options["state"], output_final_state=True
    )
    assert_same(ops.scan(q, k, v, **options), (want.transpose(1, 2), last))


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens(variant, form):
    tensors, options = scan_terms(variant, 0)
    out, state = ops.scan(*tensors, **options, form=form)
    assert out.shape == (2, 4, 0, 24)
    assert torch.equal(state, options["state"])


def test_states_of_bfloat16_are_float32():
    (q, k, v), _ = scan_terms("no decay", 400, dtype=torch.bfloat16)
    out, state = ops.scan(q, k, v)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    want = ops.scan(q.float(), k.float(), v.float())[1]
    assert (state - want).abs().max() <= TOLERANCE[torch.float32] * want.abs().max()


def test_forms_do_not_share_memory_with_their_input():
    (q, k, v), options = scan_terms("delta", 20)
    before = options["state"].clone()
    _, state = ops.scan(q, k, v, **options)
    state.zero_()
    assert torch.equal(options["state"], before)


def bad(length=5, **changed):
    q, k, v = torch.ones(2, 4, length, 8), torch.ones(2, 2, 5, 8), torch.ones(2, 2, 5, 6)
    return ops.scan(q, k, v, **changed)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"length": 4}, ValueError, "q has 4 tokens, k has 5"),
        ({"decay": torch.ones(4)}, ValueError, r"decay must be \(2,\), got \(4,\)"),
        ({"decay": torch.ones(2, 4, 5)}, ValueError, r"decay must be \(2, 2, 5\), got \(2, 4, 5\)"),
        ({"decay": torch.ones(2, 2, 5, 8)}, ValueError, r"decay \(2, 2, 5, 8\) is per channel"),
        (
            {"decay": torch.ones(2, 2, 5, 8), "side": "value"},
            ValueError,
            r"decay must be \(2, 2, 5, 6\), got \(2, 2, 5, 8\)",
        ),
        ({"decay": torch.ones(2, 2)}, ValueError, r"decay must be \(heads,\), .* got \(2, 2\)"),
        ({"decay": torch.ones(2).long()}, TypeError, r"decay must be .* got torch\.int64 tensor"),
        ({"decay": -1.0}, TypeError, "decay must be a floating-point tensor, got float"),
        ({"side": "left"}, ValueError, "side must be 'key' or 'value', got 'left'"),
        ({"beta": torch.ones(2, 4, 5)}, ValueError, r"beta must be \(2, 2, 5\), got \(2, 4, 5\)"),
        (
            {"beta": torch.ones(2, 2, 5), "decay": torch.ones(2, 2, 5, 6), "side": "value"},
            ValueError,
            "beta .* decay on the value side .* use side='key'",
        ),
        ({"state": torch.ones(2, 4, 8, 6)}, ValueError, r"state must be \(2, 2, 8, 6\), got"),
        ({"valid": torch.ones(2, 5)}, TypeError, "valid must be a bool tensor, got torch.float32"),
        ({"valid": [True]}, TypeError, "valid must be a bool tensor, got list"),
        ({"valid": torch.ones(5).bool()}, ValueError, r"valid must be \(2, 5\), got \(5,\)"),
        ({"chunk": 48}, ValueError, "chunk must be a power of two, got 48"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"form": "loop"}, ValueError, "unknown form 'loop'; known: chunk, recurrent, parallel"),
        (
            {"decay": torch.ones(2, 2, 5, 8), "side": "key", "form": "parallel"},
            ValueError,
            "form='parallel' has one decay per token .* use form='chunk'",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(options, error, words):
    with pytest.raises(error, match=words):
        bad(**options)
