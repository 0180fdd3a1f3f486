import math

import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.sparse.spargeattn import tune
from ops_tools import largest_output
from sparse_checks import causal_keep, check_common, chosen, qkv, softmax_over, tokens_of


def sparge(**options):
    small = {"block": 16, "key_block": 8, "rows": 8, "topk": 0.3, "theta": 0.1}
    return foveate.create("spargeattn", **small | options)


def head_option(value, head):
    return value[head] if isinstance(value, tuple) else value


def plain_choice(q, k, m, head, causal):
    """The block map of one head, by the definition: q (Lq, D), k (Lk, D)."""
    (lq, dim), lk, bq, bk = q.shape, k.shape[0], m.block, m.key_block
    start, nk = max(lk - lq, 0), math.ceil(lk / bk)
    if m.smooth:
        k = k - k.mean(0)
    tiles = range(start // bq, math.ceil((start + lq) / bq))
    rows = [q[max(i * bq - start, 0) : (i + 1) * bq - start] for i in tiles]
    cols = [k[j * bk : (j + 1) * bk] for j in range(nk)]
    theta = head_option(m.theta, head)

    def similar(x):
        unit = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return min(float((unit @ unit.T).mean()), 1.0) > theta

    keep = torch.zeros(len(rows), nk, dtype=torch.bool)
    for at, (i, x) in enumerate(zip(tiles, rows, strict=True)):
        last = min((i + 1) * bq, start + lq) - 1
        seen = [j for j in range(nk) if not causal or j * bk <= last]
        trusted = [j for j in seen if similar(cols[j])]
        logits = torch.tensor([float(x.mean(0) @ cols[j].mean(0)) for j in trusted])
        probs = torch.softmax(logits / math.sqrt(dim), 0)
        order = probs.argsort(descending=True).tolist()
        if m.tau is None:
            picked = order[: max(1, int(head_option(m.topk, head) * nk))]
        else:
            tau = head_option(m.tau, head)
            count = int((probs.sort(descending=True).values.cumsum(0) <= tau).sum())
            picked = order[: max(1, count)] if tau < 1 else order
        whole = not similar(x)
        for j in seen:
            rank = trusted.index(j) if j in trusted else None
            keep[at, j] = whole or rank is None or rank in picked or j == 0
    return keep


def plain_map(q, k, m, causal=True):
    group = q.shape[1] // k.shape[1]
    return torch.stack(
        [
            torch.stack([plain_choice(q[b, h], k[b, h // group], m, h, causal) for h in range(4)])
            for b in range(q.shape[0])
        ]
    )


def coherent(lk, lq=None, **options):
    """Inputs whose blocks are partly self-similar."""
    q, k, v = qkv(lk, lq, **options)
    turns = torch.randn(1, 1, k.shape[2] // 16 + 1, q.shape[3], generator=torch.manual_seed(3))
    drift = 1.5 * turns.repeat_interleave(16, 2)
    k = k + drift[:, :, :lk]
    return (q + drift[:, :, lk - q.shape[2] : lk] if q.shape[2] <= lk else q), k, v


@pytest.mark.parametrize(("lq", "lk"), [(128, 128), (125, 125), (60, 125), (5, 125)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smooth": False},
        {"tau": 0.6},
        {"tau": (0.2, 0.5, 0.9, 1.0), "theta": (0.0, 0.1, 0.2, 0.3)},
        {"topk": (0.1, 0.3, 0.5, 0.7)},
    ],
)
def test_equals_the_definition(lq, lk, options):
    q, k, v = coherent(lk, lq, batch=2)
    m = sparge(skip=math.inf, **options)
    layout = chosen(m, q, k)
    want = plain_map(q, k, m)
    assert want.float().mean() < 0.95 * ops.causal_map((lq, lk), (16, 8)).float().mean() or lq == 5
    assert torch.equal(layout.to_bool(), want)
    keep = tokens_of(layout) & causal_keep(lq, lk)
    torch.testing.assert_close(m(q, k, v), softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("lq", "lk"), [(125, 125), (150, 70)])
def test_attention_to_both_sides_equals_the_definition(lq, lk):
    q, k, v = coherent(lk, lq)
    m = sparge(skip=math.inf)
    layout = chosen(m, q, k, causal=False)
    assert torch.equal(layout.to_bool(), plain_map(q, k, m, causal=False))
    want = softmax_over(q, k, v, tokens_of(layout))
    torch.testing.assert_close(m(q, k, v, causal=False), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"topk": 1.0}, {"tau": 1.0}, {"theta": 1.0, "topk": 0.1}])
@pytest.mark.parametrize("causal", [True, False])
def test_full_budget_and_full_distrust_equal_dense(options, causal):
    q, k, v = qkv(125)
    out = sparge(skip=math.inf, **options)(3 * q, k, v, causal=causal)
    want = ops.attend(3 * q, k, v, causal=causal)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


def test_single_rows_and_zero_rows_count_as_they_should():
    q, k, v = qkv(129)
    q[:, :, :16] = 0
    layout = chosen(sparge(topk=0.01, theta=0.9), q, k).to_bool()
    # A block of one row is similar to itself, one of zeros is not similar to anything.
    assert layout[:, :, 0, :2].all()
    assert chosen(sparge(topk=0.01, theta=0.9), q, k).counts.min() >= 1
    assert sparge()(0 * q, 0 * k, v).isfinite().all()


@pytest.mark.parametrize("limit", [1.0, 2.0, 4.0])
def test_skipped_mass_is_bounded_by_the_threshold(limit):
    q, k, v = qkv(125)
    q = 3 * q
    want = ops.attend(q, k, v, causal=True)
    got = sparge(topk=1.0, skip=limit, sink=False)(q, k, v)
    gap = (got - want).abs().amax(-1)
    assert gap.max() > 1e-5
    # What is skipped weighs at most exp(-limit) a key against a weight of one that stays.
    share = 125 * math.exp(-limit)
    assert (gap <= 2 * v.abs().max() * min(1.0, share)).all()


def test_heads_of_different_skip_are_those_heads_run_alone():
    q, k, v = qkv(125, batch=2)
    limits = (0.5, 3.0, math.inf, 0.5)
    got = sparge(skip=limits)(2 * q, k, v)
    for h, limit in enumerate(limits):
        alone = sparge(skip=limit)(2 * q, k, v)
        torch.testing.assert_close(got[:, h], alone[:, h], atol=1e-6, rtol=1e-5)
    assert (got[:, 0] - sparge(skip=math.inf)(2 * q, k, v)[:, 0]).abs().max() > 1e-4


def test_causal_rows_always_see_a_key():
    q, k, v = qkv(125)
    v = v.abs() + 1
    out = sparge(topk=0.01, theta=-1.0)(q, k, v)
    assert (out > 0.9).all()


def test_trusting_blocks_that_are_not_similar_loses_more():
    """A key block whose keys cancel out hides its one strong key from the pooled score."""
    g = torch.Generator().manual_seed(0)
    dim = 16
    q = torch.randn(1, 1, 1, dim, generator=g).expand(-1, -1, 128, -1) * 2
    k = 0.1 * torch.randn(1, 1, 128, dim, generator=g)
    k[:, :, 40], k[:, :, 41] = 4 * q[:, :, 0], -4 * q[:, :, 0]
    themes = torch.randn(1, 1, 16, dim, generator=g)
    themes[:, :, 5] = -0.2 * q[:, :, 0]
    k += themes.repeat_interleave(8, 2)
    v = torch.randn(1, 1, 128, dim, generator=g)
    want = ops.attend(q, k, v)
    errors = []
    for theta in (0.7, -1.0):
        out = sparge(topk=0.2, theta=theta, smooth=False, sink=False)(q, k, v, causal=False)
        errors.append(float((out - want).abs().sum() / want.abs().sum()))
    assert errors[0] < 0.1 < errors[1]


def test_tuning_keeps_its_bounds_and_saves_work():
    g = torch.Generator().manual_seed(0)
    themes = 1.2 * torch.randn(1, 2, 16, 16, generator=g)
    k, v = themes.repeat_interleave(16, 2), torch.randn(1, 2, 256, 16, generator=g)
    asked = torch.stack([themes[0, h // 2, torch.randperm(16, generator=g)] for h in range(4)])
    q = asked.repeat_interleave(16, 1)[None] + 0.3 * torch.randn(1, 4, 256, 16, generator=g)
    k = k + 0.3 * torch.randn(1, 2, 256, 16, generator=g)
    base = sparge(tau=0.9, key_block=16)
    m = tune(q, k, v, base, causal=False, l1=0.1, l2=0.12, thetas=(-1.0, 0.0, 0.25, 0.5))
    want = ops.attend(q, k, v)

    def errors(mechanism):
        gap = (mechanism(q, k, v, causal=False) - want).abs().sum((0, 2, 3))
        return gap / want.abs().sum((0, 2, 3))

    assert (errors(m) < 0.12).all()
    assert chosen(m, q, k, causal=False).density(causal=False) < 0.8
    # A slightly smaller share breaks the bound for every head that is not dense.
    less = tuple(max(tau - 2e-3, 1e-4) for tau in m.tau)
    broken = errors(sparge(theta=m.theta, tau=less, skip=math.inf, key_block=16)) >= 0.1
    small = torch.tensor([tau < 3e-3 for tau in m.tau])
    assert (broken | small).all()


def test_tuning_makes_heads_dense_that_it_cannot_thin():
    q, k, v = qkv(125)
    m = tune(q, k, v, sparge(tau=0.9), l1=1e-6, l2=1e-5, thetas=(-1.0, 0.5))
    assert m.tau == (1.0,) * 4 and m.skip == (math.inf,) * 4
    torch.testing.assert_close(m(q, k, v), ops.attend(q, k, v, causal=True), atol=1e-5, rtol=1e-4)


def test_tuned_options_survive_a_spec():
    m = sparge(tau=(0.5, 0.25, 1.0, 0.75), skip=(1.0, 2.0, math.inf, 4.0))
    assert foveate.create(foveate.registry.spec_of(m)) == m


def test_common_claims():
    check_common(sparge(skip=2.0), *coherent(125, batch=2))


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    m = foveate.create("spargeattn", topk=0.2)
    assert largest_output(lambda: m(q, k, v)) < 4096 * 4096 // 8


@pytest.mark.parametrize(
    "option",
    [{"topk": 0.0}, {"tau": -0.1}, {"theta": -1.5}, {"skip": -1.0}, {"rows": 7}, {"key_block": 0}],
)
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        sparge(**option)


def test_refuses_a_wrong_number_of_heads():
    with pytest.raises(ValueError, match="4 values"):
        sparge(theta=(0.1, 0.2))(*qkv(64))
