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

SIZES = {"sinks": 3, "budget": 10, "window": 12, "chunk": 8}
READ = 25


def made(**options):
    return foveate.create("token_select", **{**SIZES, **options})


def tables(positions):
    """Rotary tables (1, L, 8) of positions (1, L)."""
    angles = positions[..., None] * 100.0 ** (-torch.arange(4) / 4)
    return torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)


def tensors(n=60, q_heads=4, kv_heads=2, seed=0):
    torch.manual_seed(seed)
    q = 2 * torch.randn(1, q_heads, n, 8)
    return q, torch.randn(1, kv_heads, n, 8), torch.randn(1, kv_heads, n, 8)


def turned(x, positions):
    return ops.rope(x, *tables(torch.as_tensor(positions)[None]))


def brute(q, k, v, start, end, *, rotary, reindex, scale=1.0, pool=0):
    """Plain reference of the chunk of queries [start, end), from unrotated q and k."""
    lists = chosen(q[:, :, start:end], k[:, :, :end], rotary=rotary, scale=scale, pool=pool)
    read = [*range(SIZES["sinks"]), *lists, *range(end - SIZES["window"], end)]
    at = torch.arange(len(read)) if reindex else torch.tensor(read)
    rows = at[len(read) - (end - start) :]
    outs = []
    for h in range(4):
        keys, values = k[0, h // 2, read], v[0, h // 2, read]
        queries = q[0, h, start:end]
        if rotary:
            keys, queries = turned(keys[None, None], at)[0, 0], turned(queries[None, None], rows)
            queries = queries[0, 0]
        logits = queries @ keys.T * 8**-0.5
        last = (
            torch.arange(len(read))[None]
            > torch.arange(len(read) - (end - start), len(read))[:, None]
        )
        outs.append(torch.softmax(logits.masked_fill(last, -torch.inf), -1) @ values)
    return torch.stack(outs)[None], lists


def chosen(q, k, *, rotary, scale=1.0, pool=0):
    """Plain reference of the vote: candidates in order, from unrotated queries and keys."""
    n, lq = k.shape[2], q.shape[2]
    if rotary:
        q = turned(q, torch.arange(lq) + SIZES["window"])
    candidates = range(SIZES["sinks"], n - SIZES["window"])
    votes = torch.zeros(len(candidates))
    for h in range(4):
        products = k[0, h // 2, candidates] @ q[0, h].mean(0) * scale
        votes += torch.softmax(products, 0)
    if pool:
        reach = pool // 2
        votes = torch.stack(
            [votes[max(j - reach, 0) : j + reach + 1].max() for j in range(len(candidates))]
        )
    return sorted((votes.topk(SIZES["budget"]).indices + SIZES["sinks"]).tolist())


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("reindex", [False, True])
@pytest.mark.parametrize("options", [{}, {"score_scale": 0.3, "pool": 3}])
def test_chunks_and_steps_read_what_the_definition_says(rotary, reindex, options):
    mechanism, memory = made(reindex=reindex, threshold=2.0, **options), Memory()
    q, k, v = tensors()
    given = (turned(q, range(60)), turned(k, range(60)), v) if rotary else (q, k, v)
    call = {"memory": memory, "rope": tables if rotary else None}
    out = mechanism(*(x[:, :, :50] for x in given), call=Call(**call))
    plain = {"rotary": rotary, "reindex": reindex, "pool": options.get("pool", 0)}
    plain["scale"] = options.get("score_scale", 1.0)
    for lo, hi in ((32, 40), (40, 48), (48, 50)):
        want, _ = brute(q, k, v, lo, hi, **plain)
        torch.testing.assert_close(out[:, :, lo:hi], want, atol=1e-5, rtol=1e-4)
    early = ops.attend(*(x[:, :, :24] for x in given), causal=True)
    torch.testing.assert_close(out[:, :, :24], early, atol=1e-5, rtol=1e-4)
    for t in range(50, 60):
        part = (given[0][:, :, t : t + 1], given[1][:, :, : t + 1], v[:, :, : t + 1])
        got = mechanism(*part, call=Call(phase="decode", **call))
        want, lists = brute(q, k, v, t, t + 1, **plain)
        assert memory.rows(0, 1)[0]["idx"].tolist() == [0, 1, 2, *lists]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def decode(mechanism, queries, prompt=40):
    """Steps after a prompt: which chose anew, and the lists."""
    _, k, v = tensors(queries.shape[2])
    memory, lists, fresh = Memory(), [], []
    for t in range(prompt, queries.shape[2]):
        part = (queries[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        mechanism(*part, call=Call(phase="decode", memory=memory))
        held = memory.rows(0, 1)[0]
        lists.append(held["idx"])
        fresh.append(held["age"] == 1)
    return fresh, lists


def test_a_threshold_above_one_always_chooses_and_one_below_minus_one_only_once():
    q = tensors(52)[0]
    assert all(decode(made(threshold=1.1), q)[0])
    fresh, lists = decode(made(threshold=-1.1), q)
    assert fresh == [True] + [False] * 11
    assert all(torch.equal(x, lists[0]) for x in lists)


def test_a_choice_lasts_at_most_max_reuse_steps():
    fresh = decode(made(threshold=-1.1, max_reuse=3), tensors(50)[0])[0]
    assert [t for t, new in enumerate(fresh) if new] == [0, 3, 6, 9]


def test_a_steady_query_keeps_its_choice_and_a_turned_one_does_not():
    queries = torch.ones(1, 4, 52, 8)
    queries[:, :, 46:] = -1
    fresh = decode(made(threshold=0.9), queries)[0]
    assert [t for t, new in enumerate(fresh) if new] == [0, 6]


def test_reused_choices_move_on_with_the_window():
    mechanism, memory = made(threshold=-1.1), Memory()
    q, k, v = tensors(48)
    for t in range(40, 48):
        part = (q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        out = mechanism(*part, call=Call(phase="decode", memory=memory))
        kept = memory.rows(0, 1)[0]["idx"]
        idx = torch.cat((kept, torch.arange(t + 1 - 12, t + 1))).view(1, 1, 1, -1)
        torch.testing.assert_close(out, ops.gather(*part, idx))


@pytest.mark.parametrize("cuts", [(24, 60), (32, 33, 34, 60), (50, 52, 60)])
def test_a_prompt_in_pieces_chooses_as_its_chunks_do(cuts):
    q, k, v = tensors()
    at_once = made(threshold=2.0)(q, k, v)
    memory, lo, outs = Memory(), 0, []
    for hi in cuts:
        call = Call(memory=memory)
        outs.append(made()(q[:, :, lo:hi], k[:, :, :hi], v[:, :, :hi], call=call))
        lo = hi
    whole = torch.cat(outs, 2)
    aligned = [t for t in range(60) if all(t // 8 * 8 >= c or t < c // 8 * 8 for c in cuts[:-1])]
    torch.testing.assert_close(whole[:, :, aligned], at_once[:, :, aligned])


def test_what_is_recorded_is_what_is_read():
    records = []
    q, k, v = tensors()
    made()(q, k, v, call=Call(record=records.append))
    seen = records[0].layout.to_bool()[0, 0]
    assert seen.sum(1).tolist() == [8, 16, 24, *[READ] * 5]
    for tile in range(3, 8):
        end = min(tile * 8 + 8, 60)
        assert seen[tile, :3].all() and seen[tile, end - 12 : end].all()
        assert not seen[tile, end:].any()
    assert 0 < records[0].retained_mass < 1


def test_reindexed_positions_stay_below_the_number_of_tokens_read():
    asked = []

    def noting(positions):
        asked.append(int(positions.max()))
        return tables(positions)

    q, k, v = tensors(400)
    positions = torch.arange(400)[None]
    mechanism = made(threshold=2.0)
    mechanism(q, k, v, call=Call(rope=noting, positions=positions))
    new = [x for x in asked if x < READ]
    # Whatever lies further was asked only to undo the rotation: once for each key and query.
    assert max(new) == READ - 1 and max(asked) == 399


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be at least 1"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"chunk": 13}, "chunk must be at most the window 12, got 13"),
        ({"max_reuse": 13}, "max_reuse must be at least 1 and at most the window 12"),
        ({"pool": 2}, "pool must be odd, or 0"),
        ({"score_scale": 0.0}, "score_scale must be above 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


SMALL = "token_select:budget=4,sinks=1,window=4,chunk=2,threshold=0.7"


def test_full_budget_equals_plain(tiny_llama):
    spec = "token_select:budget=64,sinks=1,window=4,chunk=2"
    check_equals_plain(tiny_llama, prefill=spec, decode=spec)


@pytest.mark.parametrize("reindex", ["", ",reindex=false"])
def test_small_budget_differs_from_plain(tiny_llama, reindex):
    check_differs_from_plain(tiny_llama, decode=SMALL + reindex)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("slots", [("decode",), ("prefill", "decode")])
def test_padded_row_equals_row_alone(tiny_llama, beams, slots):
    check_padded_row_equals_row_alone(tiny_llama, beams, **dict.fromkeys(slots, SMALL))


def test_padded_row_equals_row_alone_over_an_evicting_cache(tiny_llama):
    check_padded_row_equals_row_alone(tiny_llama, decode=SMALL, cache="snapkv:budget=12,window=4")


def test_reset_equals_fresh(tiny_llama):
    check_reset_equals_fresh(tiny_llama, prefill=SMALL, decode=SMALL)


def test_reorder_commutes(tiny_llama):
    check_reorder_commutes(tiny_llama, prefill=SMALL, decode=SMALL)
