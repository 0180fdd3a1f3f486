import pytest
import torch

import foveate
from attached import prompt
from foveate import ops
from foveate.attention.base import Call
from foveate.attention.sparse.moa import band
from foveate.bench.tune.influence import Influence, by_distance, influence, spans
from ops_tools import largest_output
from sparse_checks import causal_keep, check_common, qkv, softmax_over


def moa(**options):
    return foveate.create("moa", **{"block": 8, "sinks": 8} | options)


def plain_keep(lq, lk, bands, block, sinks):
    keep = torch.zeros(1, len(bands), lq, lk, dtype=torch.bool)
    for h, size in enumerate(bands):
        for row in range(lq):
            for key in range(lk):
                gap = (row + lk - lq) // block - key // block
                keep[0, h, row, key] = key < sinks or 0 <= gap < size
    return keep & causal_keep(lq, lk)


@pytest.mark.parametrize(("lq", "lk"), [(90, 90), (37, 90), (1, 90)])
@pytest.mark.parametrize("sinks", [0, 8])
def test_every_head_sees_sinks_and_its_own_blocks(lq, lk, sinks):
    q, k, v = qkv(lk, lq)
    m = moa(alpha=(8.0, -16.0), beta=(0.1, 0.5), sinks=sinks)
    # 90 tokens are 12 blocks: 1 + 1.2 -> 2 and -2 + 6 -> 4, for two query heads each.
    keep = plain_keep(lq, lk, [2, 2, 4, 4], 8, sinks)
    torch.testing.assert_close(m(q, k, v), softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [90, 64, 7])
def test_all_of_the_length_equals_dense(length):
    q, k, v = qkv(length)
    out = moa(alpha=(0.0,), beta=(1.0,))(q, k, v)
    torch.testing.assert_close(out, ops.attend(q, k, v, causal=True), atol=1e-5, rtol=1e-4)


def test_spans_follow_their_rule():
    assert [band(64, 0.0, n, 64) for n in (100, 1000)] == [1, 1]
    assert [band(-128, 0.25, n, 64) for n in (256, 1024, 4096)] == [1, 2, 14]
    assert band(0, 0.29, 6400, 64) == 29
    assert band(-1e6, 0.5, 1024, 64) == 1


def test_layers_read_their_own_rules():
    q, k, v = qkv(90)
    per_head = moa(alpha=(0.0,) * 4, beta=(0.2, 0.4, 0.6, 0.8))
    second = per_head(q, k, v, call=Call(layer=1, layers=2))
    torch.testing.assert_close(second, moa(alpha=(0.0, 0.0), beta=(0.6, 0.8))(q, k, v))
    per_layer = moa(alpha=(0.0,) * 3, beta=(0.2, 0.4, 0.6))
    third = per_layer(q, k, v, call=Call(layer=2, layers=3))
    torch.testing.assert_close(third, moa(beta=(0.6,))(q, k, v))


@pytest.mark.parametrize("length", [9, 40, 90])
def test_decode_equals_prefill_row_at_a_fixed_length(length):
    q, k, v = qkv(90, batch=2)
    m = moa(alpha=(0.0, 8.0), beta=(0.2, 0.4), length=90)
    step = m(q[:, :, length - 1 : length], k[:, :, :length], v[:, :, :length])
    want = m(q, k, v)[:, :, length - 1 : length]
    torch.testing.assert_close(step, want, atol=1e-5, rtol=1e-4)


def test_common_claims():
    check_common(moa(alpha=(0.0, 8.0), beta=(0.2, 0.4), length=90), *qkv(90, batch=2))


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    assert largest_output(lambda: moa(block=64, beta=(0.1,))(q, k, v)) < 4096 * 4096 // 8


@pytest.mark.parametrize(
    "option",
    [{"alpha": (0.0, 1.0)}, {"alpha": ()}, {"beta": (-0.1,)}, {"sinks": -1}, {"length": 0}],
)
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        moa(**option)
    with pytest.raises(ValueError, match="2 values"):
        moa(alpha=(0.0,) * 3, beta=(0.5,) * 3)(*qkv(30))


def plain_influence(q, k, v, weights, block, sinks):
    """Exact change of sum(weights * out) by every pair that is hidden, by block distance."""
    n, group = -(-q.shape[2] // block), q.shape[1] // k.shape[1]
    total = torch.zeros(k.shape[1], n, dtype=q.dtype)
    for h in range(q.shape[1]):
        kv = h // group
        logits = q[0, h] @ k[0, kv].T * q.shape[3] ** -0.5
        probs = torch.softmax(logits.masked_fill(~causal_keep(*logits.shape), -torch.inf), -1)
        g = weights[0, h] @ v[0, kv].T
        for i in range(1, q.shape[2]):
            for j in range(i + 1):
                if j // block < sinks // block and j // block < i // block:
                    continue
                less = probs[i].clone()
                less[j] = 0
                change = float(g[i] @ (less / less.sum() - probs[i]))
                total[kv, i // block - j // block] += abs(change)
    return total


@pytest.mark.parametrize("sinks", [0, 4])
def test_influence_is_the_exact_change_by_hiding_a_pair(sinks):
    q, k, v = qkv(22, dtype=torch.float64, dim=8)
    weights = torch.randn(q.shape, generator=torch.manual_seed(0), dtype=torch.float64)
    out, lse = ops.attend(q, k, v, causal=True, return_lse=True)
    got = by_distance(q, k, v, out, lse, weights, scale=8**-0.5, block=4, sinks=sinks)
    want = plain_influence(q, k, v, weights, 4, sinks)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_profile_of_a_model_finds_what_hiding_changes(tiny_llama):
    ids = prompt(64)
    profile = influence(tiny_llama, [ids, prompt(64, 1)], block=8, sinks=8, scored=16)
    assert profile.by_distance.shape == (2, 2, 8) and profile.length == 64
    assert (profile.by_distance >= 0).all() and (profile.by_distance[..., :6].sum(-1) > 0).all()
    assert torch.equal(profile.loss(8), torch.zeros(2, 2))
    alone = influence(tiny_llama, [ids], block=8, sinks=8, scored=16).by_distance
    other = influence(tiny_llama, [prompt(64, 1)], block=8, sinks=8, scored=16).by_distance
    torch.testing.assert_close(profile.by_distance, (alone + other) / 2)
    with pytest.raises(ValueError, match="one length"):
        influence(tiny_llama, [ids, prompt(32)])


def test_search_gives_far_sighted_heads_the_room_and_keeps_the_density():
    flat, steep = torch.ones(16), 100 * 0.5 ** torch.arange(16.0)
    profile = Influence(torch.stack([torch.stack([flat, steep])] * 3), 64, 1024)
    plan = spans([profile], density=0.5)
    sizes = torch.tensor([band(a, b, 1024, 64) for a, b in zip(plan.alpha, plan.beta, strict=True)])
    assert ((sizes + 1).clamp_max(16) / 16).mean() <= 0.5
    sizes = sizes.view(3, 2)
    assert (sizes[:, 0] > sizes[:, 1]).any() or (sizes[:, 0] < sizes[:, 1]).any()
    uniform = float(profile.loss(7).sum())
    mixed = sum(
        float(profile.loss(int(s))[i, j]) for i, r in enumerate(sizes) for j, s in enumerate(r)
    )
    assert mixed < uniform
