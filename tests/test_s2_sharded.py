import time

import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from ops_tools import largest_output
from sparse_checks import causal_keep, check_common, chosen, qkv, softmax_over


def plain_keep(lq, lk, m, q_heads, kv_heads, causal):
    """Pairs each query head reads, by the definition and token by token: (Hq, Lq, Lk)."""
    step = max(1, m.stride // q_heads) if m.head_step is None else m.head_step
    keep = torch.zeros(q_heads, lq, lk, dtype=torch.bool)
    for head in range(q_heads):
        h = head // (q_heads // kv_heads)
        for row in range(lq):
            i = (row + lk - lq) // m.block
            for key in range(lk):
                j = key // m.block
                if h >= kv_heads - m.dense_heads:
                    seen = True
                elif causal:
                    seen = i - j < m.local_blocks
                    seen |= (j + h * step + m.offset) % m.stride == 0
                else:
                    d = max(0, i - j - m.local_blocks + 1) + max(0, j - i - m.local_blocks + 1)
                    seen = d % m.stride == 0
                keep[head, row, key] = seen
    return keep & causal_keep(lq, lk) if causal else keep


def sharded(**options):
    return foveate.create("s2_sharded", **{"block": 4, "local_blocks": 2, "stride": 4} | options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lq", "lk"), [(64, 64), (61, 61), (30, 61), (1, 61)])
@pytest.mark.parametrize(
    "options", [{}, {"offset": 1}, {"head_step": 2}, {"dense_heads": 1}, {"stride": 9}]
)
def test_equals_the_definition_token_by_token(lq, lk, causal, options):
    q, k, v = qkv(lk, lq)
    m = sharded(**options)
    want = softmax_over(q, k, v, plain_keep(lq, lk, m, 4, 2, causal))
    torch.testing.assert_close(m(q, k, v, causal=causal), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"stride": 1}, {"dense_heads": 2}, {"local_blocks": 99}])
def test_full_budget_equals_dense(options):
    q, k, v = qkv(61)
    want = ops.attend(q, k, v, causal=True)
    torch.testing.assert_close(sharded(**options)(q, k, v), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kv_heads", "step", "covers"), [(4, 1, True), (3, 1, False), (4, 2, False)]
)
def test_heads_cover_the_context_iff_they_hold_all_residues(kv_heads, step, covers):
    q, k, _ = qkv(64, heads=kv_heads, kv_heads=kv_heads)
    blocks = chosen(sharded(head_step=step), q, k).to_bool()[0].any(0)
    assert bool((blocks == ops.causal_map((64, 64), (4, 4))).all()) == covers


def test_a_block_that_left_a_head_never_returns():
    q, k, _ = qkv(80)
    blocks = chosen(sharded(), q, k).to_bool()[0]
    outside = torch.ones(20, 20).tril(-2).bool()[1:]
    assert (blocks[:, 1:] <= blocks[:, :-1])[:, outside].all()


def test_decode_over_what_a_head_still_sees_equals_prefill():
    q, k, v = qkv(61)
    m = sharded()
    whole = m(q, k, v)
    for t in (17, 40, 60):
        step = m(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        torch.testing.assert_close(step, whole[:, :, t : t + 1], atol=1e-5, rtol=1e-4)
        for h in range(2):
            kept = plain_keep(1, t + 1, m, 4, 2, True)[2 * h, 0]
            heads = slice(2 * h, 2 * h + 2)
            evicted = ops.attend(
                q[:, heads, t : t + 1], k[:, h : h + 1, : t + 1][:, :, kept],
                v[:, h : h + 1, : t + 1][:, :, kept],
            )  # fmt: skip
            torch.testing.assert_close(evicted, step[:, heads], atol=1e-5, rtol=1e-4)


def test_query_heads_of_a_kv_head_share_its_blocks():
    q, k, _ = qkv(61, heads=8, kv_heads=2)
    assert chosen(sharded(), q, k).indices.shape[1] == 2


def test_a_mask_is_applied_inside_the_blocks():
    q, k, v = qkv(61)
    documents = torch.arange(61) // 25
    m = sharded()
    keep = plain_keep(61, 61, m, 4, 2, True) & (documents[:, None] == documents)
    out = m(q, k, v, mask=ops.documents(documents))
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


def test_common_claims():
    check_common(sharded(), *qkv(90, batch=2))


def test_long_patterns_are_made_fast_and_in_memory_of_the_blocks():
    length = 65536
    q, k = torch.empty(1, 32, length, 1), torch.empty(1, 8, length, 1)
    m = foveate.create("s2_sharded")
    began = time.process_time()
    m.select(q, k, Call())
    assert time.process_time() - began < 1.0
    other = foveate.create("s2_sharded", offset=1)
    assert largest_output(lambda: other.select(q, k, Call())) <= 8 * (length // 64) ** 2


@pytest.mark.parametrize(
    "option", [{"stride": 0}, {"local_blocks": 0}, {"dense_heads": -1}, {"head_step": -1}]
)
def test_refuses_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        sharded(**option)


def test_refuses_more_dense_heads_than_there_are():
    with pytest.raises(ValueError, match="dense_heads must be at most the 2 kv heads, got 3"):
        sharded(dense_heads=3)(*qkv(30))
