import math

import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from grid_checks import coordinates
from ops_tools import largest_output
from sparse_checks import qkv, softmax_over


def rectified(**options):
    small = {"shape": (10, 3, 2), "block": 6, "drop": 0.8, "p_keep": 0.2}
    return foveate.create("rectified_spaattn", **small | options)


def plain(lk):
    """A mask that hides nothing, under which no means are used: plain block-sparse attention."""
    return ops.dense(torch.ones(lk, lk, dtype=torch.bool))


def largest(entries, count, p):
    """The largest entries, `count` of them or up to the one that crosses p."""
    order = entries.argsort(descending=True, stable=True)
    kept = max(count, int((entries[order].cumsum(0) <= p).sum()) + 1)
    return set(order[:kept].tolist())


def touch(a, b):
    """Whether two sets of coordinates (n, axes), (m, axes) hold tokens that touch."""
    return bool(((a[:, None] - b).abs().amax(-1) <= 1).any())


def plain_head(q, k, v, m, at):
    """One head by the definition: q (Lq, D), k, v (Lk, D), tokens of the grid at places `at`."""
    size, (lk, dim), b = math.prod(m.shape), k.shape, m.block
    start, scale = lk - q.shape[0], dim**-0.5
    words = range(size, lk)
    blocks = [list(range(j, min(j + b, size))) for j in range(0, size, b)]
    frame = at[:, 0] == 0
    out = torch.softmax(q @ k.T * scale, -1) @ v  # the text's rows stay as they are
    for number, whole in enumerate(blocks):
        rows = [p - start for p in whole if p >= start]
        if not rows:
            continue
        mean, off = q[rows].mean(0), (q[rows] - q[rows].mean(0)).abs().mean(0)
        weights = [len(c) * torch.exp(mean @ k[c].mean(0) * scale) for c in blocks]
        text = sum((torch.exp(mean @ k[t] * scale) for t in words), torch.zeros(()))
        entries = torch.stack([*weights, text]) / (sum(weights) + text)
        count = int(round((1 - m.drop) * len(blocks), 6) // 1)
        critical = largest(entries if len(words) else entries[:-1], count, m.p_keep)
        pooled = []
        for j, c in enumerate(blocks):
            first = m.first_frame and bool(frame[whole].any() and frame[c].any())
            if touch(at[whole], at[c]) or first:
                critical.add(j)
            center = k[c].mean(0)
            error = (off @ center).abs() + (mean @ (k[c] - center).abs().mean(0)).abs()
            if j not in critical and (mean @ center).abs() > error:
                pooled.append(j)
        read = [t for j in critical if j < len(blocks) for t in blocks[j]] + list(words)
        exact = torch.softmax(q[rows] @ k[read].T * scale, -1) @ v[read]
        left = 1 - sum(entries[j] for j in pooled)
        out[rows] = left * exact + sum(entries[j] * v[blocks[j]].mean(0) for j in pooled)
        assert number in critical
    return out


def by_definition(q, k, v, m):
    at, group, back = coordinates(m.shape), q.shape[1] // k.shape[1], slice(None)
    if m.tile:
        order = torch.arange(k.shape[2])
        order[: len(at)] = ops.tile_order(m.shape, m.tile)
        at, back = at[order[: len(at)]], order.argsort()
        q, k, v = (x[:, :, order] for x in (q, k, v))
    heads = [
        [plain_head(q[b, h], k[b, h // group], v[b, h // group], m, at) for h in range(q.shape[1])]
        for b in range(q.shape[0])
    ]
    return torch.stack([torch.stack(x) for x in heads])[:, :, back]


def themed(lk, **options):
    """Inputs whose blocks have means that can stand for them."""
    q, k, v = qkv(lk, **options)
    drift = torch.randn(1, 1, lk // 6 + 1, 16, generator=torch.manual_seed(5))
    drift = drift.repeat_interleave(6, 2)[:, :, :lk]
    return 0.15 * q + drift, 0.2 * k + drift.roll(12, 2), v + drift


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"first_frame": True},
        {"block": 8, "drop": 0.7},
        {"p_keep": 0.6},
        {"shape": (60,), "p_keep": 0.05, "drop": 0.95},
        {"shape": (6, 10), "tile": (2, 5), "block": 10},
        {"shape": (8, 4, 2), "tile": (2, 2, 2), "block": 8, "first_frame": True},
        {"shape": (8, 2, 4), "tile": (2, 2, 2), "block": 4, "first_frame": True},
    ],
)
def test_equals_the_definition(options, text):
    m = rectified(**options)
    size = math.prod(m.shape)
    q, k, v = themed(size + text, batch=2)
    want = by_definition(q, k, v, m)
    torch.testing.assert_close(m(q, k, v, causal=False), want, atol=1e-5, rtol=1e-4)
    assert m.shares(q[:, :, :size], k, Call())[1].sum(-1).max() > 0.05


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("rows", [3, 20, 41])
def test_a_chunk_of_queries_equals_the_definition(rows, text):
    m = rectified(block=8)
    q, k, v = themed(60 + text)
    chunk = q[:, :, -rows:]
    want = by_definition(chunk, k, v, m)
    torch.testing.assert_close(m(chunk, k, v, causal=False), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"p_keep": 1.0}, {"drop": 0.0}, {"drop": -1.0}])
def test_nothing_dropped_is_dense(options):
    q, k, v = themed(65)
    out = rectified(**options)(q, k, v, causal=False)
    torch.testing.assert_close(out, ops.attend(q, k, v), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("drop", [0.5, 0.95])
def test_blocks_of_one_token_are_dense(drop):
    q, k, v = qkv(65)
    m = rectified(block=1, drop=drop, p_keep=0.05)
    torch.testing.assert_close(m(q, k, v, causal=False), ops.attend(q, k, v), atol=1e-5, rtol=1e-4)


def test_weights_sum_to_one():
    q, k, v = themed(65)
    ones = torch.full_like(v, 3.0)
    torch.testing.assert_close(rectified()(q, k, ones, causal=False), torch.full_like(q, 3.0))
    assert rectified().shares(q[:, :, :60], k, Call())[1].sum(-1).max() > 0.2


def test_smooth_tokens_lose_less_than_by_dropping_blocks():
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, 2, 40, 16, generator=g).repeat_interleave(6, 2)
        + 0.1 * torch.randn(1, 2, 240, 16, generator=g)
        for _ in range(3)
    )
    m, want = rectified(shape=(40, 3, 2)), ops.attend(q, k, v)
    dropping, error = (
        float((m(q, k, v, causal=False, mask=mask) - want).norm() / want.norm())
        for mask in (plain(240), None)
    )
    assert error < dropping / 2


def test_a_mask_leaves_plain_attention_over_the_critical_blocks():
    q, k, v = themed(65)
    m = rectified()
    critical, _ = m.shares(q[:, :, :60], k, Call())
    keep = torch.ones(1, 4, 65, 65, dtype=torch.bool)
    keep[:, :, :60, :60] = critical.repeat_interleave(6, 2).repeat_interleave(6, 3)
    other = torch.rand(65, 65, generator=torch.manual_seed(3)) > 0.3
    for mask, seen in ((plain(65), keep), (ops.dense(other), keep & other)):
        got = m(q, k, v, causal=False, mask=mask)
        torch.testing.assert_close(got, softmax_over(q, k, v, seen), atol=1e-5, rtol=1e-4)


def test_masks_and_chunks_know_rows_only():
    tiled = rectified(shape=(6, 10), tile=(2, 5), block=10)
    rows = rectified(shape=(6, 10), block=10)
    q, k, v = themed(65)
    for x, mask in ((q, plain(65)), (q[:, :, -30:], None)):
        assert torch.equal(
            tiled(x, k, v, causal=False, mask=mask), rows(x, k, v, causal=False, mask=mask)
        )
    assert not torch.allclose(tiled(q, k, v, causal=False), rows(q, k, v, causal=False), atol=1e-3)


@pytest.mark.parametrize("text", [0, 4, 6])
def test_records_count_the_pairs_that_are_read(text):
    q, k, v = themed(60 + text)
    m, records = rectified(), []
    m(q, k, v, causal=False, call=Call(record=records.append))
    critical, _ = m.shares(q[:, :, :60], k, Call())
    pairs = critical.float().mean() * 60**2 + (60 + text) ** 2 - 60**2
    assert records[0].density == pytest.approx(float(pairs) / (60 + text) ** 2)
    assert 0 < records[0].retained_mass < 1


def test_padded_text_is_not_read():
    q, k, v = themed(65, batch=2)
    valid = torch.ones(2, 65, dtype=torch.bool)
    valid[1, 62:] = False
    out = rectified()(q, k, v, causal=False, call=Call(valid=valid))
    alone = rectified()(*(x[1:, :, :62] for x in (q, k, v)), causal=False)
    torch.testing.assert_close(out[1:, :, :62], alone, atol=1e-5, rtol=1e-4)
    assert not out[1, :, 62:].any()


def test_gradients_flow_through_means_and_shares():
    q, k, v = (x.double().requires_grad_() for x in themed(62, heads=2, kv_heads=1))
    m = rectified()

    def loss(*tensors):
        return m(*tensors, causal=False).sin().sum()

    grads = torch.autograd.grad(loss(q, k, v), (q, k, v))
    with torch.no_grad():
        for x, grad in zip((q, k, v), grads, strict=True):
            step = 1e-6 * torch.randn(x.shape, dtype=x.dtype, generator=torch.manual_seed(2))
            ends = [loss(*(y + s * step if y is x else y for y in (q, k, v))) for s in (1, -1)]
            assert float(ends[0] - ends[1]) == pytest.approx(
                float(2 * (grad * step).sum()), rel=1e-4
            )


def test_no_quadratic_tensor():
    q, k, v = qkv(4096, heads=2, kv_heads=1)
    m = rectified(shape=(16, 16, 16), block=64, tile=(4, 4, 4))
    assert largest_output(lambda: m(q, k, v, causal=False)) < 4096 * 4096 // 8


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"drop": 1.0}, "drop must be below 1"),
        ({"p_keep": 0.0}, "p_keep must be above 0"),
        ({"block": 0}, "block must be at least 1"),
        ({"shape": ()}, "1 to 3 axes"),
        ({"tile": (4, 1, 1)}, "tile must divide"),
        ({"shape": (6, 10), "first_frame": True}, r"needs a shape \(frames, height, width\)"),
    ],
)
def test_refuses_bad_options(option, words):
    with pytest.raises(ValueError, match=words):
        rectified(**option)


def test_refuses_calls_that_do_not_fit():
    with pytest.raises(ValueError, match="has 60 keys, got 59"):
        rectified()(*qkv(59), causal=False)
    with pytest.raises(ValueError, match="at most 65 queries, one per key, got 70"):
        rectified()(*qkv(65, 70), causal=False)
    with pytest.raises(ValueError, match="noncausal attention only"):
        rectified()(*qkv(60))
