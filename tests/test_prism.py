import math

import pytest
import torch

import foveate
from foveate import ops
from ops_tools import largest_output
from sparse_checks import causal_keep, check_common, chosen, qkv, softmax_over, tokens_of


def plain_bands(dim, m):
    """Dims of the high and of the low band, pair by pair."""
    width = m.rotary_dim or dim
    pairs = [
        (2 * i, 2 * i + 1) if m.interleaved else (i, i + width // 2) for i in range(width // 2)
    ]
    high = pairs[: round(m.high * len(pairs))]
    low = pairs[len(pairs) - round(m.low * len(pairs)) :]
    return [i for p in high for i in p], [i for p in low for i in p] + list(range(width, dim))


def plain_choice(q, k, m):
    """The block map of one head, by the definition: q (Lq, D), k (Lk, D)."""
    (lq, dim), lk, b = q.shape, k.shape[0], m.block
    n, start = math.ceil(lk / b), lk - lq
    rows = range(start // b, n)
    q_mean = torch.stack([q[max(i * b - start, 0) : (i + 1) * b - start].mean(0) for i in rows])
    k_mean = torch.stack([k[j * b : (j + 1) * b].mean(0) for j in range(n)])

    def rms(x):
        return x.square().mean().sqrt()

    keep = torch.tensor([[j in (0, i) for j in range(n)] for i in rows])
    for band in plain_bands(dim, m):
        qb, kb, d = q_mean[:, band], k_mean[:, band], len(band)
        t = math.sqrt(d / dim) * rms(qb) / rms(q_mean) * rms(kb) / rms(k_mean)
        for row, i in enumerate(rows):
            logits = kb[: i + 1] @ qb[row] / (math.sqrt(d) * (t if m.calibrate else 1))
            probs, total = torch.softmax(logits, 0), 0.0
            for j in probs.argsort(descending=True).tolist():
                if total >= m.p:
                    break
                keep[row, j] = True
                total += float(probs[j])
    return keep


def plain_map(q, k, m):
    group = q.shape[1] // k.shape[1]
    rows = [
        [plain_choice(q[b, h], k[b, h // group], m) for h in range(q.shape[1])]
        for b in range(q.shape[0])
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize(("lq", "lk"), [(128, 128), (125, 125), (60, 125), (5, 125)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p": 0.5},
        {"p": 0.5, "calibrate": False},
        {"p": 0.5, "interleaved": True},
        {"p": 0.5, "rotary_dim": 8, "high": 0.25, "low": 0.5},
    ],
)
def test_equals_the_definition(lq, lk, options):
    q, k, v = qkv(lk, lq, batch=2)
    m = foveate.create("prism", block=8, **options)
    layout = chosen(m, q, k)
    assert torch.equal(layout.to_bool(), plain_map(q, k, m))
    keep = tokens_of(layout) & causal_keep(lq, lk)
    torch.testing.assert_close(m(q, k, v), softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


def test_full_budget_equals_dense_on_peaked_maps_too():
    q, k, v = qkv(125)
    m = foveate.create("prism", block=8, p=1.0)
    want = ops.attend(30 * q, k, v, causal=True)
    torch.testing.assert_close(m(30 * q, k, v), want, atol=1e-5, rtol=1e-4)


def test_temperatures_do_not_depend_on_the_size_of_q_or_k():
    q, k, _ = qkv(128)
    m = foveate.create("prism", block=8)
    for dims in m._bands(16, q.device):
        want = m._logits(q, k, dims)
        torch.testing.assert_close(m._logits(7 * q, k, dims), 7 * want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(m._logits(q, 7 * k, dims), 7 * want, rtol=1e-4, atol=1e-4)


def test_interleaved_rope_gives_the_same_choice():
    q, k, _ = qkv(125)
    halves = chosen(foveate.create("prism", block=8, p=0.5), q, k).to_bool()
    pairs = torch.arange(16).view(2, 8).T.flatten()
    m = foveate.create("prism", block=8, p=0.5, interleaved=True)
    assert torch.equal(chosen(m, q[..., pairs], k[..., pairs]).to_bool(), halves)


def test_first_and_diagonal_block_are_always_read():
    q, k, _ = qkv(125, batch=2)
    blocks = chosen(foveate.create("prism", block=8, p=0.01), q, k).to_bool()
    assert blocks[..., 0].all() and blocks.diagonal(dim1=-2, dim2=-1).all()


def test_mean_pooling_is_a_low_pass_of_known_strength():
    block, theta = 16, torch.linspace(0.01, 3.0, 32)
    angles = torch.arange(block * 4)[:, None] * torch.cat((theta, theta))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 1, 64, generator=g).expand(-1, -1, block * 4, -1)
    pooled = ops.pool_blocks(ops.rope(x, angles.cos(), angles.sin()), block)[0, 0, 2]

    def size(y):
        return torch.hypot(*y.view(2, 32))

    want = ((block * theta / 2).sin() / (block * (theta / 2).sin())).abs()
    torch.testing.assert_close(size(pooled) / size(x[0, 0, 0]), want, atol=1e-4, rtol=1e-4)


def test_high_band_finds_a_slash_that_full_width_pooling_misses():
    block, n, back = 8, 32, 5
    g = torch.Generator().manual_seed(0)
    theta = 2 * math.pi * torch.linspace(0.2, 0.9, 16) / block
    angles = torch.arange(block * n)[:, None] * theta

    def low():
        return 6 * torch.randn(n, 32, generator=g).repeat_interleave(block, 0)

    def vectors(shift):
        turned, unrelated = angles - shift * theta, low()
        halves = (2 * turned.cos(), unrelated[:, :16], 2 * turned.sin(), unrelated[:, 16:])
        return torch.cat(halves, -1)[None, None]

    q, k = vectors(back * block), vectors(0)
    two_bands = chosen(foveate.create("prism", block=block, p=0.5, low=0.5), q, k)
    full_width = chosen(foveate.create("prism", block=block, p=0.9, low=1.0, high=1.0), q, k)
    found, missed = (
        x.to_bool()[0, 0].diagonal(-back).float().mean() for x in (two_bands, full_width)
    )
    assert two_bands.density() < 0.5
    assert found == 1 and missed < 0.5


def test_common_claims():
    check_common(foveate.create("prism", block=8, p=0.5), *qkv(125, batch=2))


def test_zero_inputs_and_empty_bands_stay_finite():
    q, k, v = qkv(125)
    q[..., :4] = q[..., 8:12] = 0
    m = foveate.create("prism", block=8, p=0.5)
    assert m(q, k, v).isfinite().all() and m(0 * q, k, v).isfinite().all()


def test_decoding_is_dense():
    q, k, v = qkv(125, 1)
    m = foveate.create("prism", block=8, p=0.1)
    torch.testing.assert_close(m(q, k, v), ops.attend(q, k, v, causal=True))


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    m = foveate.create("prism", block=64, p=0.3)
    assert largest_output(lambda: m(q, k, v)) < 4096 * 4096 // 8


@pytest.mark.parametrize("option", [{"p": 0}, {"high": 0}, {"low": 1.5}, {"rotary_dim": 7}])
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        foveate.create("prism", **option)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="causal"):
        foveate.create("prism")(*qkv(30), causal=False)
    with pytest.raises(ValueError, match="rotary_dim"):
        foveate.create("prism", rotary_dim=32)(*qkv(30))
