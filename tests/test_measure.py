import pytest
import torch

from foveate import ops
from foveate.native import kernels
from ops_tools import TOLERANCE, qkv
from test_scores import probabilities

BACKENDS = ("native", "torch", "reference") if kernels() else ("torch", "reference")
LENGTHS = [(20, 20), (7, 20), (1, 20)]
REAL = torch.arange(20) >= torch.tensor([[0], [6]])
VISIBLE = {
    "all": {},
    "causal": {"causal": True},
    "window": {"causal": True, "mask": ops.window(5)},
    "padding": {"causal": True, "mask": ops.padding(REAL)},
}


def the_map(q, k, visible, softcap=None):
    """Weights (B, Hq, Lq, Lk) written out, and what `ops.attend` calls their lse."""
    options = dict(visible)
    s, p = probabilities(q, k, options.pop("causal", False), mask=options.pop("mask", None))
    if softcap is not None:
        s = torch.where(s.isinf(), s, softcap * torch.tanh(s / softcap))
        p = torch.softmax(s, -1).nan_to_num(0.0)
    return p, torch.logsumexp(s, -1)


def close(got, want, dtype):
    assert not got.isnan().any()
    tol = TOLERANCE[dtype] / 4
    torch.testing.assert_close(got, want.to(got.dtype), rtol=tol, atol=tol)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_row_and_column_statistics_are_those_of_the_map(name, visible, lengths, dtype, softcap):
    options = VISIBLE[visible]
    q, k, _ = qkv(*lengths, dtype=dtype)
    p, want_lse = the_map(q.double(), k.double(), options, softcap)
    keys = torch.randn(2, 2, lengths[1], 3, dtype=dtype)
    rows = torch.randn(2, 4, lengths[0], 2, dtype=dtype)
    with ops.backend(name):
        stats = ops.row_stats(q, k, keys, softcap=softcap, **options)
        close(stats.lse, want_lse, dtype)
        close(stats.means, p @ keys.double().repeat_interleave(2, 1), dtype)
        close(stats.entropy, -torch.xlogy(p, p).sum(-1), dtype)
        mass = ops.attend_T(q, k, stats.lse, softcap=softcap, **options)
        close(mass[..., 0], p.sum(2), dtype)
        turned = ops.attend_T(q, k, stats.lse, rows, softcap=softcap, **options)
        close(turned, p.mT @ rows.double(), dtype)
    counts = ops.visible_counts(*lengths, **options)
    for got, want in zip(counts, ((p > 0).sum(-1), (p > 0).sum(2)), strict=True):
        assert torch.equal(got.expand_as(want), want)
    some = torch.tensor([0, lengths[0] - 1])
    close(ops.attention_rows(q, k, some, softcap=softcap, **options), p[:, :, some], dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_padding_given_as_valid_equals_padding_as_a_mask(name):
    q, k, _ = qkv(20, 20)
    padded = ops.padding(REAL)
    with ops.backend(name):
        lse = ops.row_stats(q, k, mask=padded, causal=True).lse
        by_mask = ops.attend_T(q, k, lse, mask=padded, causal=True)
        by_valid = ops.attend_T(q, k, lse, valid=REAL, causal=True)
    assert lse[1, :, :6].isinf().all()
    close(by_valid, by_mask, torch.float32)
    assert (by_valid[1, :, :6] == 0).all()


def test_uniform_and_one_hot_attention():
    q, k = torch.zeros(1, 2, 16, 8), torch.randn(1, 1, 16, 8)
    stats = ops.row_stats(q, k, causal=True)
    visible = torch.arange(1, 17).float()
    torch.testing.assert_close(stats.entropy, visible.log().expand(1, 2, 16), rtol=1e-5, atol=2e-6)
    mass = ops.attend_T(q, k, stats.lse, causal=True)[..., 0]
    want = (1 / visible).flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(mass, want.expand(1, 2, 16), rtol=1e-5, atol=1e-6)
    q[..., 0], k = 100.0, torch.zeros(1, 1, 16, 8)
    k[:, :, 0, 0] = 1.0
    stats = ops.row_stats(q, k, causal=True)
    assert float(stats.entropy.max()) < 1e-5
    mass = ops.attend_T(q, k, stats.lse, causal=True)[0, 0, :, 0]
    torch.testing.assert_close(mass, torch.tensor([16.0] + [0.0] * 15), rtol=1e-5, atol=1e-6)


def test_columns_are_relatively_exact_at_length():
    """Sums reach L: 2e-6 relative is what float32 gives; keys with a common part keep it."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 2048, 64), torch.randn(1, 2, 2048, 64)
    k = k + 3 * torch.randn(64)
    p, _ = the_map(q.double(), k.double(), {"causal": True})
    stats = ops.row_stats(q, k, causal=True)
    mass = ops.attend_T(q, k, stats.lse, causal=True)[..., 0].double()
    assert float((mass / p.sum(2) - 1).abs().max()) < 2e-5
    assert float((stats.entropy + torch.xlogy(p, p).sum(-1)).abs().max()) < 2e-5


def test_bad_input_is_named():
    q, k, _ = qkv(7, 20)
    lse = torch.zeros(2, 4, 7)
    with pytest.raises(ValueError, match=r"u must be \(2, 1 or 2, 20, m\), got \(2, 2, 7, 1\)"):
        ops.row_stats(q, k, torch.ones(2, 2, 7, 1))
    with pytest.raises(ValueError, match="lse must be"):
        ops.attend_T(q, k, lse[:, :2])
    with pytest.raises(ValueError, match="valid must be"):
        ops.attend_T(q, k, lse, valid=REAL[:, :7])
    with pytest.raises(IndexError, match=r"rows must be in \[0, 7\)"):
        ops.attention_rows(q, k, torch.tensor([7]))
    with pytest.raises(ValueError, match="there are 20 queries and only 7 keys"):
        ops.attend_T(k, q[:, :2], torch.zeros(2, 2, 20), causal=True)
