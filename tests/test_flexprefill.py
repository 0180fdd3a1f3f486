import math

import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from ops_tools import largest_output
from sparse_checks import causal_keep, check_common, chosen, qkv, softmax_over, tokens_of


def plain_choice(q, k, m):
    """The block map of one head, by the definition: q (Lq, D), k (Lk, D); and its pattern."""
    (lq, dim), lk, b = q.shape, k.shape[0], m.block
    n, start = math.ceil(lk / b), lk - lq
    last, r = q[-b:], min(b, lq)
    scores = last @ k.T * dim**-0.5
    for i in range(r):
        scores[i, lk - r + i + 1 :] = -math.inf
    seen = torch.softmax(scores, -1)
    vertical = seen.mean(0)
    slash = torch.zeros(lk)
    for i in range(r):
        for key in range(lk - r + i + 1):
            slash[lk - r + i - key] += seen[i, key] / r
    columns, bands, k_mean = torch.zeros(n), torch.zeros(n), torch.zeros(n, dim)
    for j in range(n):
        part = slice(j * b, (j + 1) * b)
        columns[j], bands[j], k_mean[j] = vertical[part].sum(), slash[part].sum(), k[part].mean(0)
    guess = torch.softmax(k_mean @ last.mean(0) * dim**-0.5, 0)
    middle = (guess + columns) / 2
    gap = sum(
        float(x * (x / y).log())
        for p in (guess, columns)
        for x, y in zip(p, middle, strict=True)
        if x > 0
    )
    aware = math.sqrt(max(gap / 2, 0)) < m.tau

    least = min(n, math.ceil(m.min_budget / b))
    most = n if m.max_budget is None else min(n, math.ceil(m.max_budget / b))

    def budget(mass):
        total, tokens = 0.0, 1
        for x in mass.sort(descending=True).values.tolist():
            total += x
            tokens += total <= m.gamma
        return min(max(tokens // b + 1, least), most)

    counts = (least, least) if aware else (budget(vertical), budget(slash))
    kept = [
        {0, *sorted(range(1, n), key=lambda j: -float(mass[j]))[: count - 1]}
        for mass, count in zip((columns, bands), counts, strict=True)
    ]
    diagonals = {e + c for e in kept[1] for c in range(m.slash_cover)}
    rows = range(start // b, n)
    keep = torch.tensor(
        [[j <= i and (j in kept[0] or i - j in diagonals) for j in range(n)] for i in rows]
    )
    if aware:
        probs = torch.zeros(len(rows), n)
        for t, i in enumerate(rows):
            q_mean = q[max(i * b - start, 0) : (i + 1) * b - start].mean(0)
            probs[t, : i + 1] = torch.softmax(k_mean[: i + 1] @ q_mean * dim**-0.5, 0)
        total = 0.0
        for x, at in zip(*probs.flatten().sort(descending=True), strict=True):
            total += float(x)
            if total > m.gamma * len(rows) and total > float(x):  # one entry always stays
                break
            keep[int(at) // n, int(at) % n] = True
    return keep, aware


def plain_map(q, k, m):
    """Block maps (B, Hq, nQ, nK) and patterns (B, Hq)."""
    group = q.shape[1] // k.shape[1]
    pairs = [
        [plain_choice(q[b, h], k[b, h // group], m) for h in range(q.shape[1])]
        for b in range(q.shape[0])
    ]
    maps = torch.stack([torch.stack([x for x, _ in row]) for row in pairs])
    return maps, torch.tensor([[a for _, a in row] for row in pairs])


@pytest.mark.parametrize(("lq", "lk"), [(128, 128), (125, 125), (60, 125), (5, 125)])
@pytest.mark.parametrize("gamma", [0.3, 0.8])
@pytest.mark.parametrize("tau", [0.0, 0.21, 1.0])
@pytest.mark.parametrize("slash_cover", [1, 2])
def test_equals_the_definition(lq, lk, gamma, tau, slash_cover):
    q, k, v = qkv(lk, lq, batch=2)
    options = {"gamma": gamma, "tau": tau, "slash_cover": slash_cover}
    m = foveate.create("flexprefill", block=8, min_budget=12, **options)
    maps, aware = plain_map(q, k, m)
    assert bool(aware.any()) == (tau > 0) and bool(aware.all()) == (tau == 1)
    layout = chosen(m, q, k)
    assert torch.equal(layout.to_bool(), maps)
    keep = tokens_of(layout) & causal_keep(lq, lk)
    torch.testing.assert_close(m(q, k, v), softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


def test_max_budget_holds():
    q, k, _ = qkv(128)
    m = foveate.create("flexprefill", block=8, min_budget=8, max_budget=20, gamma=0.99, tau=0.0)
    assert torch.equal(chosen(m, q, k).to_bool(), plain_map(q, k, m)[0])
    free = foveate.create("flexprefill", block=8, min_budget=8, gamma=0.99, tau=0.0)
    assert chosen(m, q, k).density() < chosen(free, q, k).density()


@pytest.mark.parametrize("option", [{"gamma": 1.0}, {"min_budget": 125}, {"block": 64}])
def test_full_budget_equals_dense(option):
    q, k, v = qkv(125)
    m = foveate.create("flexprefill", **{"block": 8, "min_budget": 16} | option)
    torch.testing.assert_close(m(q, k, v), ops.attend(q, k, v, causal=True), atol=1e-5, rtol=1e-4)


def test_first_and_diagonal_block_are_always_read():
    q, k, _ = qkv(125, batch=2)
    for tau in (0.0, 1.0):
        m = foveate.create("flexprefill", block=8, min_budget=8, gamma=0.05, tau=tau)
        blocks = chosen(m, q, k).to_bool()
        assert blocks[..., 0].all() and blocks.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_density_grows_with_gamma(tau):
    q, k, _ = qkv(256)
    options = {"block": 8, "min_budget": 8, "tau": tau}
    gammas = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    layouts = [chosen(foveate.create("flexprefill", gamma=g, **options), q, k) for g in gammas]
    density = [layout.density() for layout in layouts]
    assert density == sorted(density) and density[0] < density[-1]


def test_a_head_looking_back_by_a_fixed_distance_is_covered_by_a_slash():
    length, back = 256, 40
    angles = torch.arange(length)[:, None] * torch.linspace(0.3, 2.5, 16)

    def wave(x):
        return torch.cat((x.cos(), x.sin()), -1)[None, None]

    k = 3 * wave(angles)
    q = 3 * wave(angles - back * torch.linspace(0.3, 2.5, 16))
    m = foveate.create("flexprefill", block=8, min_budget=16, gamma=0.5, tau=0.0)
    blocks = chosen(m, q, k).to_bool()[0, 0]
    assert blocks.diagonal(-back // 8).all()
    records = []
    m(q, k, torch.randn(1, 1, length, 32), call=Call(record=records.append))
    assert records[0].retained_mass > 0.8 and records[0].density < 0.25


def test_large_logits_do_not_spoil_the_divergence():
    q, k, v = qkv(125)
    m = foveate.create("flexprefill", block=8, min_budget=8, tau=0.84)
    assert plain_map(100 * q, k, m)[1].all()
    assert torch.equal(chosen(m, 100 * q, k).to_bool(), plain_map(100 * q, k, m)[0])
    assert m(100 * q, k, v).isfinite().all()


def test_common_claims():
    for tau in (0.0, 1.0):
        m = foveate.create("flexprefill", block=8, min_budget=8, gamma=0.5, tau=tau)
        check_common(m, *qkv(125, batch=2))


def test_decoding_is_dense():
    q, k, v = qkv(125, 1)
    m = foveate.create("flexprefill", block=8, min_budget=8, gamma=0.1)
    torch.testing.assert_close(m(q, k, v), ops.attend(q, k, v, causal=True))


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    m = foveate.create("flexprefill", block=64, gamma=0.3)
    assert largest_output(lambda: m(q, k, v)) < 4096 * 4096 // 8


@pytest.mark.parametrize(
    "option",
    [{"gamma": 0}, {"tau": -0.1}, {"min_budget": 0}, {"max_budget": 100}, {"slash_cover": 3}],
)
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        foveate.create("flexprefill", **option)


def test_refuses_attention_to_both_sides():
    with pytest.raises(ValueError, match="causal"):
        foveate.create("flexprefill")(*qkv(30), causal=False)
