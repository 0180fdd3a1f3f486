import math

import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from ops_tools import largest_output
from sparse_checks import causal_keep, check_common, qkv, softmax_over


def hyper(**options):
    small = {"projections": 4, "block": 16, "samples": 24, "min_seq_len": 16}
    return foveate.create("hyperattention", **small | options)


def drawn(m, dim):
    """Planes and the generator after them, as a call makes them."""
    g = torch.Generator().manual_seed(m.seed)
    return torch.randn(dim, m.projections, generator=g), g


def plain_estimate(q, k, v, m, planes, at):
    """One head to both sides by the definition: out (Lq, D) and lse (Lq,)."""
    (lq, dim), lk = q.shape, k.shape[0]
    gray = [i ^ (i >> 1) for i in range(2**m.projections)]

    def order(x):
        codes = [sum(int(row @ p > 0) << i for i, p in enumerate(planes.T)) for row in x]
        return sorted(range(len(x)), key=lambda t: gray.index(codes[t]))

    order_q, order_k = order(q), order(k)
    rows = math.ceil(lq * m.block / lk)
    out, lse = torch.zeros(lq, v.shape[1]), torch.zeros(lq)
    for place, t in enumerate(order_q):
        block = place // rows
        near = order_k[block * m.block : (block + 1) * m.block]
        far = [order_k[int(s)] for s in at if int(s) // m.block != block]
        weights = torch.exp(k[near + far] @ q[t] / math.sqrt(dim))
        weights[len(near) :] *= lk / len(at)
        out[t] = weights @ v[near + far] / weights.sum()
        lse[t] = weights.sum().log()
    return out, lse


@pytest.mark.parametrize(("lq", "lk"), [(64, 64), (61, 61), (37, 90), (90, 37)])
def test_attention_to_both_sides_equals_the_definition(lq, lk):
    q, k, v = qkv(lk, lq)
    m = hyper()
    planes, g = drawn(m, 16)
    at = torch.randint(lk, (m.samples,), generator=g)
    out = m(q, k, v, causal=False)[0]
    for h in range(4):
        want, _ = plain_estimate(q[0, h], k[0, h // 2], v[0, h // 2], m, planes, at)
        torch.testing.assert_close(out[h], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [64, 59])
def test_causal_attention_equals_exact_halves_and_an_estimate_between(length):
    q, k, v = qkv(length)
    m = hyper(min_seq_len=length - length // 2)
    half = length // 2
    planes, g = drawn(m, 16)
    at = torch.randint(half, (m.samples,), generator=g)
    out = m(q, k, v)[0]
    for h in range(4):
        x, y, z = q[0, h], k[0, h // 2], v[0, h // 2]
        cross = plain_estimate(x[half:], y[:half], z[:half], m, planes, at)
        own = (x[half:] @ y[half:].T / 4).masked_fill(~causal_keep(*[length - half] * 2), -math.inf)
        share = torch.sigmoid(own.logsumexp(-1) - cross[1])[:, None]
        want = share * (torch.softmax(own, -1) @ z[half:]) + (1 - share) * cross[0]
        torch.testing.assert_close(out[h, half:], want, atol=1e-5, rtol=1e-4)
    early = ops.attend(q[:, :, :half], k[:, :, :half], v[:, :, :half], causal=True)
    torch.testing.assert_close(out[None, :, :half], early, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"min_seq_len": 500}, {"block": 500}])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lq", [125, 50])
def test_short_sequences_and_wide_blocks_equal_dense(options, causal, lq):
    q, k, v = qkv(125, lq)
    want = ops.attend(q, k, v, causal=causal)
    torch.testing.assert_close(hyper(**options)(q, k, v, causal=causal), want, atol=1e-5, rtol=1e-4)


def test_denominator_is_right_on_average():
    q, k, v = qkv(96, heads=1, kv_heads=1)
    k = k / 2
    _, want = ops.attend(q, k, v, return_lse=True)
    made = hyper(seed=0)
    planes, _ = drawn(made, 16)
    ratios = []
    for seed in range(400):
        from foveate.attention.sparse.hyperattention import _Run

        # The same buckets, other samples.
        run = _Run(made, planes, torch.Generator().manual_seed(seed), Call(causal=False))
        ratios.append(torch.exp(run.estimate(q, k, v, 0, 0)[1] - want))
    ratios = torch.stack(ratios)
    assert abs(float(ratios.mean()) - 1) < 0.01
    assert ratios.std(0).max() > 0.01


def test_neighbouring_buckets_differ_in_one_projection():
    m = hyper(projections=7)
    g = torch.Generator().manual_seed(1)
    corners = 2.0 * torch.tensor([[(i >> r) & 1 for r in range(7)] for i in range(128)]) - 1
    ranks = m.ranks(corners[None, None], torch.eye(7))[0, 0]
    assert ranks.sort().values.tolist() == list(range(128))
    in_order = corners[ranks.argsort()]
    assert ((in_order[1:] != in_order[:-1]).sum(-1) == 1).all()
    x = torch.randn(1, 1, 50, 7, generator=g)
    planes = torch.randn(7, 7, generator=g)
    assert torch.equal(m.ranks(x, planes), m.ranks(1e3 * x, planes))


def test_later_keys_and_values_carry_no_weight():
    q, k, v = qkv(125)
    want = hyper()(q, k, v)
    for cut in (30, 62, 100):
        y, z = k.clone(), v.clone()
        y[:, :, cut:], z[:, :, cut:] = -2 * y[:, :, cut:].flip(2), 100
        got = hyper()(q, y, z)[:, :, :cut]
        torch.testing.assert_close(got, want[:, :, :cut], atol=1e-5, rtol=1e-4)


def test_a_mask_hides_keys_in_blocks_samples_and_halves():
    q, k, v = qkv(125, batch=2)
    documents = torch.stack([torch.arange(125) // 70, torch.arange(125) // 30])
    out = hyper()(q, k, v, mask=ops.documents(documents))
    shifted = v.clone()
    shifted[0, :, :70] += 100
    got = hyper()(q, k, shifted, mask=ops.documents(documents))
    torch.testing.assert_close(got[0, :, 70:], out[0, :, 70:], atol=1e-5, rtol=1e-4)
    exact = softmax_over(q, k, v, causal_keep(125, 125))
    assert (out[0, :, 70:] - exact[0, :, 70:]).abs().max() > 1e-2


def test_shared_clusters_make_the_estimate_better_than_chance():
    g = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(16, 16, generator=g)
    of_q, of_k = (torch.randint(16, (256,), generator=g) for _ in range(2))
    q, k = (centres[of] + 0.3 * torch.randn(256, 16, generator=g) for of in (of_q, of_k))
    v = torch.randn(1, 1, 256, 16, generator=g)
    q, k = q[None, None], k[None, None]
    want = ops.attend(q, k, v)

    def error(seed, length):
        m = hyper(projections=8, seed=seed)
        return float((m(q, k, v, causal=False) - want).norm() / want.norm()) / length

    hashed = sum(error(seed, 5) for seed in range(5))
    q_mixed = -q  # the hash of the opposite puts every query far from its own keys
    want = ops.attend(q_mixed, k, v)
    q = q_mixed
    apart = sum(error(seed, 5) for seed in range(5))
    assert hashed < apart


def test_common_claims():
    check_common(hyper(), *qkv(125, batch=2))


def test_decoding_is_dense():
    q, k, v = qkv(125, 1)
    torch.testing.assert_close(hyper()(q, k, v), ops.attend(q, k, v, causal=True))


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    m = hyper(block=64, samples=64, min_seq_len=256)
    assert largest_output(lambda: m(q, k, v)) < 4096 * 4096 // 8


@pytest.mark.parametrize(
    "option", [{"projections": 0}, {"projections": 17}, {"block": 0}, {"samples": 0}]
)
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        hyper(**option)
