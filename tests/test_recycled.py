import pytest
import torch

import foveate
from attached import (
    check_differs_from_plain,
    check_equals_plain,
    check_padded_row_equals_row_alone,
    check_reorder_commutes,
    check_reset_equals_fresh,
)
from foveate import ops
from foveate.attention.base import Call, Memory

PROMPT = 40


def decode(mechanism, steps, dim=8, seed=0, queries=None):
    """A prompt and `steps` decoding steps in one layer: whether each was dense, lists, inputs."""
    torch.manual_seed(seed)
    n = PROMPT + steps
    q = torch.randn(1, 4, n, dim) if queries is None else queries
    k, v = torch.randn(1, 2, n, dim), torch.randn(1, 2, n, dim)
    memory = Memory()
    call = Call(0, 1, "prefill", memory=memory)
    mechanism.after_prefill(q[:, :, :PROMPT], k[:, :, :PROMPT], call)
    lists, dense = [memory.rows(0, 1)[0]["idx"]], []
    for t in range(PROMPT, n):
        part = (q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        out = mechanism(*part, call=Call(0, 1, "decode", memory=memory))
        lists.append(memory.rows(0, 1)[0]["idx"])
        dense.append(torch.allclose(out, ops.attend(*part), atol=1e-6))
        if not dense[-1]:
            attended = torch.cat([lists[-2], torch.full_like(lists[-2][..., :1], t)], -1)
            torch.testing.assert_close(out, ops.gather(*part, attended[:, :, None]))
    return dense, lists, q, k


def weights_of(q, k, pool):
    """Plain reference: weights of one query, maximum over the group and over neighbours."""
    keys = k[0].repeat_interleave(2, 0)
    maps = torch.softmax(torch.einsum("hd,hnd->hn", q[0, :, 0], keys) * q.shape[3] ** -0.5, -1)
    best = maps.unflatten(0, (2, 2)).amax(1)
    reach = pool // 2
    columns = [best[:, max(j - reach, 0) : j + reach + 1].amax(1) for j in range(best.shape[1])]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("options", [{"stride": 1, "budget": 4}, {"budget": 100}])
def test_stride_one_and_a_full_budget_equal_dense(options):
    assert all(decode(foveate.create("recycled", **options), 12)[0])


def test_every_stride_th_step_is_dense():
    dense = decode(foveate.create("recycled", budget=6, stride=4), 13)[0]
    assert [t for t, full in enumerate(dense, 1) if full] == [4, 8, 12]


@pytest.mark.parametrize("pool", [0, 7])
def test_lists_hold_the_tokens_of_the_largest_weights(pool):
    mechanism = foveate.create("recycled", budget=6, stride=5, pool=pool)
    _, lists, q, k = decode(mechanism, 10)
    for step in (0, 5, 10):
        n = PROMPT + step
        weights = weights_of(q[:, :, n - 1 : n], k[:, :, :n], pool)
        got = weights.gather(1, lists[step][0])
        torch.testing.assert_close(got, weights.topk(6).values.flip(-1))


def test_lists_never_exceed_the_budget():
    for budget in (6, 45):
        lists = decode(foveate.create("recycled", budget=budget, stride=30), 20)[1]
        assert [x.shape[-1] for x in lists] == [min(budget, PROMPT + t) for t in range(21)]


def test_the_lowest_weight_leaves_first_and_new_tokens_stay():
    mechanism = foveate.create("recycled", budget=6, stride=30, pool=0)
    _, lists, _, _ = decode(mechanism, 8)
    for t in range(1, 7):
        new = torch.arange(PROMPT, PROMPT + t).expand(1, 2, -1)
        assert torch.equal(lists[t], torch.cat([lists[0][..., t:], new], -1))
    assert lists[8].tolist() == [[list(range(PROMPT + 2, PROMPT + 8))] * 2]


def test_without_eviction_recycling_sees_the_prompt_and_all_new_tokens():
    mechanism = foveate.create("recycled", budget=PROMPT, stride=30, evict=False)
    dense, lists, *_ = decode(mechanism, 8)
    assert all(dense)
    assert lists[8].sort().values.tolist() == [[list(range(PROMPT + 8))] * 2]


def test_group_mean_and_max_choose_differently():
    lists = [
        decode(foveate.create("recycled", budget=6, group=group), 1)[1][0]
        for group in ("max", "mean")
    ]
    assert not torch.equal(lists[0].sort().values, lists[1].sort().values)


def test_a_threshold_above_one_is_dense_at_every_check():
    mechanism = foveate.create("recycled", budget=6, threshold=1.1, check_every=3)
    dense = decode(mechanism, 10)[0]
    assert [t for t, full in enumerate(dense, 1) if full] == [3, 6, 9]


def test_a_steady_query_is_recycled_and_a_turned_one_is_not():
    queries = torch.ones(1, 4, PROMPT + 12, 8)
    queries[:, :, PROMPT + 7 :] = -1
    mechanism = foveate.create("recycled", budget=6, threshold=0.9, check_every=2)
    dense = decode(mechanism, 12, queries=queries)[0]
    assert [t for t, full in enumerate(dense, 1) if full] == [8]


def test_a_cache_that_went_on_without_us_is_read_anew():
    mechanism, memory = foveate.create("recycled", budget=4), Memory()
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 50, 8)
    for n in (30, 40):  # never seen, then ten tokens later
        part = (q, k[:, :, :n], k[:, :, :n])
        out = mechanism(*part, call=Call(0, 1, "decode", memory=memory))
        torch.testing.assert_close(out, ops.attend(*part))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"check_every": 0}, "check_every must be at least 1"),
        ({"pool": 2}, "pool must be odd, or 0"),
        ({"group": "sum"}, "group must be max or mean"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        foveate.create("recycled", **options)


SMALL = "recycled:budget=6,stride=4"


def test_full_budget_equals_plain(tiny_llama):
    check_equals_plain(tiny_llama, decode="recycled:budget=64,stride=4")


def test_small_budget_differs_from_plain(tiny_llama):
    check_differs_from_plain(tiny_llama, decode=SMALL)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", [None, "snapkv:budget=12,window=4"])
def test_padded_row_equals_row_alone(tiny_llama, beams, cache):
    check_padded_row_equals_row_alone(tiny_llama, beams, decode=SMALL, cache=cache)


def test_the_dynamic_schedule_is_each_rows_own(tiny_llama):
    spec = "recycled:budget=6,threshold=0.5,check_every=2"
    check_padded_row_equals_row_alone(tiny_llama, decode=spec)


def test_reset_equals_fresh(tiny_llama):
    check_reset_equals_fresh(tiny_llama, decode=SMALL)


def test_reorder_commutes(tiny_llama):
    check_reorder_commutes(tiny_llama, decode=SMALL)
