import math

import pytest
import torch

from foveate import ops
from ops_tools import assert_same, largest_output, qkv

LENGTHS = [(20, 20), (7, 20), (1, 20), (13, 23)]
REAL = torch.arange(23) >= torch.tensor([[0], [9]])


def probabilities(q, k, causal, scale=None, mask=None, valid=None):
    """Logits and the whole map of softmax weights, hidden pairs -inf and 0."""
    lq, lk = q.shape[2], k.shape[2]
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    s = s * (q.shape[3] ** -0.5 if scale is None else scale)
    seen = torch.ones(lq, lk, dtype=torch.bool)
    if causal:
        seen = seen.tril(lk - lq)
    if mask is not None:
        seen = seen & mask.to_dense(lq, lk)
    if valid is not None:
        seen = seen & valid[:, None, None, :lk]
    s = s.masked_fill(~seen, -math.inf)
    return s, torch.softmax(s, -1).nan_to_num(0.0)


def tiles(length, lead, block):
    """Rows of each block, cut `lead` rows before the first."""
    count = -(-(lead + length) // block)
    return [
        range(max(t * block - lead, 0), min((t + 1) * block - lead, length)) for t in range(count)
    ]


@pytest.mark.parametrize("mode", ["mean", "max", "min"])
@pytest.mark.parametrize("lead", [0, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [8, 23])
def test_blocks_pool_their_real_tokens(length, padded, lead, mode):
    x = torch.randn(2, 3, length, 4, generator=torch.Generator().manual_seed(0))
    valid = REAL[:, :length] if padded else None
    got = ops.pool_blocks(x, 4, valid=valid, mode=mode, lead=lead)
    assert got.dtype == torch.float32
    for t, rows in enumerate(tiles(length, lead, 4)):
        for b in range(2):
            real = [r for r in rows if valid is None or valid[b, r]]
            block = x[b, :, real]
            if not real:
                want = torch.zeros(3, 4)
            else:
                want = block.mean(1) if mode == "mean" else getattr(block, f"a{mode}")(1)
            assert_same(got[b, :, t], want)


def test_padding_never_leaks_into_a_pool():
    x = torch.ones(1, 1, 4, 2)
    x[:, :, :2] = math.nan
    for mode in ("mean", "max", "min"):
        valid = torch.tensor([[False, False, True, True]])
        assert (ops.pool_blocks(x, 4, valid=valid, mode=mode) == 1).all()


def test_bf16_pools_in_float32():
    x = torch.ones(1, 1, 512, 1).bfloat16()
    x[:, :, 0] = 256
    assert ops.pool_blocks(x, 512).item() == (256 + 511) / 512


REDUCE = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}


@pytest.mark.parametrize("reduce_k", ["sum", "max"])
@pytest.mark.parametrize("reduce_q", ["sum", "max", "mean", "none"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_block_mass_is_the_map_reduced(lengths, reduce_q, reduce_k):
    q, k, v = qkv(*lengths)
    start = lengths[1] - lengths[0]
    for causal, mask, (bq, bk) in (
        (True, None, (4, 4)),
        (False, None, (6, 5)),
        (True, ops.window(5) | ops.sinks(2), (4, 8)),
        (False, ops.padding(REAL[:, : lengths[1]]), (4, 4)),
        (True, ops.padding(REAL[:, : lengths[1]]), (1, 4)),
    ):
        _, lse = ops.attend(q, k, v, causal=causal, mask=mask, return_lse=True)
        got = ops.block_mass(
            q, k, lse, (bq, bk), reduce_q=reduce_q, reduce_k=reduce_k, causal=causal, mask=mask
        )
        _, p = probabilities(q, k, causal, mask=mask)
        rows = tiles(lengths[0], start % bq, bq)
        if reduce_q == "none":
            rows = [[r] for r in range(lengths[0])]
        want = torch.stack([
            torch.stack([
                REDUCE["sum" if reduce_q == "none" else reduce_q](
                    REDUCE[reduce_k](p[:, :, list(r)][..., j : j + bk], -1), -1
                )
                for j in range(0, lengths[1], bk)
            ], -1)
            for r in rows
        ], 2)  # fmt: skip
        assert_same(got, want)


def test_masses_of_a_row_sum_to_one():
    q, k, v = qkv(13, 23)
    _, lse = ops.attend(q, k, v, causal=True, return_lse=True)
    mass = ops.block_mass(q, k, lse, 4, reduce_q="none")
    assert_same(mass.sum(-1), torch.ones(2, 4, 13))


def test_entry_replaces_the_probability_and_hidden_pairs_count_nothing():
    q, k, v = qkv(13, 23)
    _, lse = ops.attend(q, k, v, causal=True, return_lse=True)
    got = ops.block_mass(q, k, lse, 4, entry=lambda p, s: p * s * s)
    s, p = probabilities(q, k, True)
    full = torch.nn.functional.pad((p * s * s).nan_to_num(0.0), (0, 1, 2, 1))
    assert_same(got, full.unfold(2, 4, 4).unfold(3, 4, 4).sum((-1, -2)))


def test_rows_that_saw_nothing_hold_no_mass():
    q, k, _ = qkv(13, 23)
    lse = torch.full((2, 4, 13), -math.inf)
    assert (ops.block_mass(q, k, lse, 4) == 0).all()


def naive_token_scores(
    q, k, row, *, causal, softmax, over, group, heads, pool, pool_mode, valid, q_valid, scale
):
    """One batch row of `token_scores`, query by query and key by key."""
    s, p = probabilities(q, k, causal, scale, valid=valid)
    kv_heads, per, lk = k.shape[1], q.shape[1] // k.shape[1], k.shape[2]
    rows = [r for r in range(q.shape[2]) if q_valid is None or q_valid[row, r]]
    rows = rows[-1:] if over == "last" else rows
    real = [valid is None or bool(valid[row, j]) for j in range(lk)]
    out = torch.zeros(kv_heads, lk)
    for h in range(kv_heads):
        for j in range(lk):
            by_head = []
            for g in range(h * per, (h + 1) * per):
                seen = [r for r in rows if s[row, g, r, j] > -math.inf]
                x = [(p if softmax else s)[row, g, r, j].item() for r in seen]
                by_head.append(
                    {
                        "mean": sum(x) / len(rows),
                        "sum": sum(x),
                        "last": sum(x),
                        "max": max(x, default=0.0),
                    }[over]
                )
            out[h, j] = {"mean": sum(by_head) / per, "sum": sum(by_head), "max": max(by_head)}[
                group
            ]
    if heads == "sum":
        out = out.sum(0, keepdim=True)
    if pool > 1:
        near = [
            [i for i in range(max(j - pool // 2, 0), min(j + pool // 2 + 1, lk)) if real[i]]
            for j in range(lk)
        ]
        pooled = [
            out[:, at].mean(1) if pool_mode == "avg" else out[:, at].amax(1) for at in near if at
        ]
        out = torch.stack(pooled, 1) if len(pooled) == lk else _spread(pooled, near)
    return out.masked_fill(~torch.tensor(real), -math.inf)


def _spread(pooled, near):
    """Pooled columns at their places, 0 where no real key is near."""
    columns = iter(pooled)
    return torch.stack([next(columns) if at else pooled[0] * 0 for at in near], 1)


PLAIN = {
    "causal": True, "softmax": True, "over": "mean", "group": "mean", "heads": "none",
    "pool": 0, "pool_mode": "avg", "valid": None, "q_valid": None, "scale": None,
}  # fmt: skip
CHANGES = [
    {},
    {"causal": False},
    {"softmax": False},
    {"over": "sum"},
    {"over": "max"},
    {"over": "last"},
    {"over": "max", "softmax": False},
    {"group": "sum"},
    {"group": "max"},
    {"heads": "sum"},
    {"pool": 5},
    {"pool": 3, "pool_mode": "max"},
    {"scale": 2.0},
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("lengths", [(7, 23), (1, 20)])
def test_token_scores_are_their_definition(lengths, change, padded):
    q, k, _ = qkv(*lengths)
    options = PLAIN | change
    if padded:
        real = REAL[:, : lengths[1]]
        options |= {"valid": real, "q_valid": real[:, -lengths[0] :]}
    got = ops.token_scores(q, k, **options)
    want = torch.stack([naive_token_scores(q, k, row, **options) for row in range(2)])
    assert_same(got, want)


def test_padded_queries_add_nothing():
    q, k, _ = qkv(7, 23)
    q_valid = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
    for over in ("mean", "sum", "max"):
        got = ops.token_scores(q, k, q_valid=q_valid, over=over)
        alone = ops.token_scores(q[1:, :, 3:], k[1:], over=over)
        assert_same(got[1:], alone)
        assert_same(got[:1], ops.token_scores(q[:1], k[:1], over=over))


def test_scores_need_no_square_tensor():
    q, k, v = qkv(4096, 4096, batch=1, q_heads=1, kv_heads=1)
    _, lse = ops.attend(q, k, v, causal=True, return_lse=True)
    assert largest_output(lambda: ops.block_mass(q, k, lse, 64)) <= 4096 * 256
    assert largest_output(lambda: ops.token_scores(q, k)) <= 4096 * 4096 // 4


def scores(**options):
    q, k, _ = qkv(7, 23)
    return ops.token_scores(q, k, **options)


def mass(**options):
    q, k, _ = qkv(7, 23)
    options = {"lse": torch.zeros(2, 4, 7), "block": 4} | options
    return ops.block_mass(q, k, **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: scores(over="min"), ValueError, "over must be one of mean, .* got 'min'"),
        (lambda: scores(group="last"), ValueError, "group must be one of .* got 'last'"),
        (lambda: scores(heads="mean"), ValueError, "heads must be one of none, sum, got 'mean'"),
        (lambda: scores(pool_mode="mean"), ValueError, "pool_mode must be one of avg, max"),
        (lambda: scores(pool=4), ValueError, "pool must be odd .* got 4"),
        (lambda: scores(valid=REAL[:, 1:]), ValueError, r"valid must be .*\(2, 23\).*\(2, 22\)"),
        (lambda: scores(q_valid=REAL.float()), ValueError, r"q_valid must be .*\(2, 7\).*float32"),
        (lambda: mass(reduce_q="min"), ValueError, "reduce_q must be one of .* got 'min'"),
        (lambda: mass(reduce_k="mean"), ValueError, "reduce_k must be one of sum, max"),
        (lambda: mass(lse=torch.zeros(2, 4, 8)), ValueError, r"lse must be \(2, 4, 7\), got"),
        (lambda: mass(block=0), ValueError, "block rows must be at least 1, got 0"),
        (lambda: ops.pool_blocks(torch.ones(1, 1, 4, 1), 0), ValueError, "block must be at least"),
        (
            lambda: ops.pool_blocks(torch.ones(1, 1, 4, 1), 2, mode="sum"),
            ValueError,
            "mode must be one of mean, max, min, got 'sum'",
        ),
        (
            lambda: ops.pool_blocks(torch.ones(1, 1, 4, 1), 2, valid=REAL),
            ValueError,
            r"valid must be a bool tensor \(1, 4\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
