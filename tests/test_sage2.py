import math

import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from foveate.registry import lookup
from ops_tools import largest_output
from sparse_checks import qkv


def sage(**options):
    return foveate.create("sage2", **{"block": 16, "key_block": 8, "rows": 8} | options)


def rounded(x, levels):
    step = x.abs().max() / levels
    step = 1.0 if step == 0 else step
    return (x / step).round() * step


def e4m3(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def plain(q, k, v, m, causal):
    """One head by the definition, block by block and row by row: q (Lq, D), k, v (Lk, D)."""
    (lq, dim), lk = q.shape, k.shape[0]
    start, levels = lk - lq, 7 if m.qk_bits == 4 else 127
    k = k - k.mean(0) if m.smooth_k else k
    mean_v = v.mean(0) if m.smooth_v else torch.zeros_like(v[0])
    v = v - mean_v
    if m.pv == "fp8":
        step = v.abs().amax(0) / 448
        step[step == 0] = 1
        v = e4m3(v / step) * step
    elif m.pv == "fp16":
        v = v.half().float()

    def part(size, row):
        first = (row + start) // size * size - start
        return slice(max(first, 0), min(first + size, lq))

    blocks = [slice(lo, min(lo + m.key_block, lk)) for lo in range(0, lk, m.key_block)]
    out = torch.zeros(lq, v.shape[1])
    for row in range(lq):
        base = q[part(m.block, row)].mean(0) if m.smooth_q else torch.zeros(dim)
        group = part(m.rows, row)
        bases = [q[part(m.block, r)].mean(0) for r in range(group.start, group.stop)]
        rest = q[group] - (torch.stack(bases) if m.smooth_q else 0)
        rest = rounded(rest, levels)[row - group.start] if m.qk_bits else rest[row - group.start]
        top, total = -math.inf, 0.0
        for block in blocks:
            keys = rounded(k[block], levels) if m.qk_bits else k[block]
            s = (keys @ rest + k[block] @ base) / math.sqrt(dim)
            if causal:
                s[torch.arange(block.start, block.stop) > row + start] = -math.inf
            new = max(top, float(s.max()))
            p, old = torch.exp(s - new), math.exp(top - new)
            total = total * old + float(p.sum())
            p = e4m3(p * 448) / 448 if m.pv == "fp8" else p
            out[row], top = out[row] * old + p @ v[block], new
        out[row] = out[row] / total + mean_v
    return out


@pytest.mark.parametrize(("lq", "lk"), [(29, 29), (3, 45)])
@pytest.mark.parametrize(
    "options",
    [{}, {"qk_bits": 8, "pv": "fp16"}, {"smooth_q": False, "smooth_v": True}, {"smooth_k": False}],
)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition(lq, lk, options, causal):
    q, k, v = qkv(lk, lq)
    m = sage(**options)
    want = torch.stack([plain(q[0, h], k[0, h // 2], v[0, h // 2], m, causal) for h in range(4)])
    got = m(q, k, v, causal=causal)[0]
    # A sum in another order may fall on the other side of a rounding: few, and by a step.
    gap = (got - want).abs()
    assert (gap > 1e-4).float().mean() < 0.01 and gap.max() < 0.05


@pytest.mark.parametrize("options", [{}, {"smooth_v": True}, {"smooth_q": False}])
@pytest.mark.parametrize("causal", [True, False])
def test_smoothing_without_rounding_equals_dense(options, causal):
    q, k, v = qkv(75)
    k, v, q = k + 5, v + 3, q + 2
    m = sage(qk_bits=None, pv="exact", **options)
    want = ops.attend(q, k, v, causal=causal)
    torch.testing.assert_close(m(q, k, v, causal=causal), want, atol=1e-5, rtol=1e-4)


def offset_keys(seed=0):
    """Keys with a large offset that all share, in some channels."""
    q, k, v = qkv(128, dim=32, seed=seed)
    return q, k + 20 * (torch.arange(32) % 5 == 0), v


def cosine(m, q, k, v):
    dense = ops.attend(q, k, v, causal=True)
    return float(torch.cosine_similarity(m(q, k, v).flatten(), dense.flatten(), dim=0))


def test_eight_bits_are_nearly_exact_and_four_bits_need_smoothing():
    inputs = offset_keys()
    assert cosine(sage(qk_bits=8, pv="fp16", smooth_q=False), *inputs) > 0.999
    plain_four, smooth_k, both = (
        cosine(sage(smooth_k=a, smooth_q=b), *inputs)
        for a, b in ((False, False), (True, False), (True, True))
    )
    assert plain_four < 0.9 < smooth_k
    assert both > 0.95


def test_rounding_of_weights_and_values_alone_is_small():
    inputs = offset_keys()
    assert 0.9999 > cosine(sage(qk_bits=None, pv="fp8"), *inputs) > 0.998


def test_lse_is_that_of_dense_attention_up_to_rounding():
    q, k, v = offset_keys()
    _, want = ops.attend(q, k, v, causal=True, return_lse=True)
    for bits, tolerance in ((None, 1e-4), (8, 0.1)):
        got = sage(qk_bits=bits).compute(q, k, v, Call(causal=True)).lse
        torch.testing.assert_close(got, want, atol=tolerance, rtol=1e-4)


def test_constant_values_come_back_exactly():
    q, k, v = qkv(75)
    v = torch.randn(1, 2, 1, 16, generator=torch.manual_seed(0)).expand(-1, -1, 75, -1)
    out = sage(smooth_v=True)(q, k, v)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1), atol=1e-6, rtol=1e-6)


def test_later_values_change_rounding_only():
    q, k, v = qkv(75)
    want = sage()(q, k, v)[:, :, :50]
    v[:, :, 60:] *= 3
    gap = (sage()(q, k, v)[:, :, :50] - want).abs()
    # Three bits of mantissa: a value moves by a sixteenth of itself at most, each time.
    assert 0 < gap.max() < v[:, :, :60].abs().max() / 8


def test_gradients_pass_through_the_rounding():
    leaves = [x.requires_grad_() for x in qkv(40)]
    sage(qk_bits=8)(*leaves).square().sum().backward()
    exact = [x.detach().clone().requires_grad_() for x in leaves]
    ops.attend(*exact, causal=True).square().sum().backward()
    for a, b in zip(leaves, exact, strict=True):
        assert torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.98


def test_zero_inputs_stay_finite():
    q, k, v = qkv(40)
    assert sage()(0 * q, 0 * k, 0 * v).abs().max() == 0


def test_decoding_is_dense():
    q, k, v = qkv(75, 1)
    torch.testing.assert_close(sage()(q, k, v), ops.attend(q, k, v, causal=True))


def test_no_quadratic_tensor():
    q, k, v = qkv(2048, heads=2, kv_heads=1)
    m = foveate.create("sage2")
    assert largest_output(lambda: m(q, k, v)) <= 2 * 2048 * 64


@pytest.mark.parametrize("option", [{"rows": 7}, {"qk_bits": 5}, {"key_block": 0}])
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        sage(**option)
    with pytest.raises(ValueError, match="pv"):
        lookup("sage2")(pv="fp4")
