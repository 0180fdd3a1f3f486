"""The figures of a comparison: each held to its definition."""

import math

import pytest
import torch

from foveate.attention.base import Call, Record
from foveate.bench import needles
from foveate.bench.maps import block_map
from foveate.bench.runs import Recording, answer, divergence, perplexity, run
from foveate.bench.store import Results
from foveate.bench.summary import summarise
from foveate.cache.snapkv import SnapKV
from foveate.ops import causal_map, from_map, full_layout
from foveate.registry import create


def test_divergence_is_the_mean_kl_and_the_share_of_equal_choices():
    p, r = torch.tensor([[0.7, 0.3], [0.4, 0.6]]), torch.tensor([[0.5, 0.5], [0.6, 0.4]])
    kl, top1 = divergence(p.log(), r.log())
    by_hand = sum(
        a * math.log(a / b)
        for row, other in zip(p.tolist(), r.tolist(), strict=True)
        for a, b in zip(row, other, strict=True)
    )
    assert kl == pytest.approx(by_hand / 2, rel=1e-5)
    assert top1 == 0.5
    assert divergence(p.log(), p.log()) == (0.0, 1.0)


def test_perplexity_is_that_of_the_models_own_loss(tiny_llama):
    ids = torch.randint(3, 128, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = tiny_llama(ids, labels=ids).loss
        hidden = tiny_llama.model(ids).last_hidden_state[0]
    assert perplexity(tiny_llama, hidden[:-1], ids[0, 1:]) == pytest.approx(
        math.exp(loss), rel=1e-4
    )


def test_a_run_with_dense_gives_the_models_own_logits(tiny_llama):
    ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    done = run(tiny_llama, {}, ids[:, :30], ids[:, 30:])
    with torch.no_grad():
        expected = tiny_llama(ids).logits[0, 30:]
    torch.testing.assert_close(done.logits, expected, rtol=1e-5, atol=1e-5)
    config = tiny_llama.config
    floats = 2 * 2 * 40 * config.num_key_value_heads * config.head_dim
    assert done.kv_bytes == 4 * floats


def test_what_an_eviction_leaves_multiplies_what_decoding_reads(tiny_llama):
    ids = torch.randint(3, 128, (1, 44), generator=torch.Generator().manual_seed(0))
    record = Recording(layer=1, head=0)
    slots = {"cache": "window:budget=10,sinks=2"}
    done = run(tiny_llama, slots, ids[:, :40], ids[:, 40:], record)
    assert record.mean("density", "prefill") is None
    assert record.mean("density", "decode") == pytest.approx(10 / 40)
    assert done.kv_bytes < run(tiny_llama, {}, ids[:, :40], ids[:, 40:]).kv_bytes / 3


def test_the_peak_of_a_cache_counts_what_attention_reads_and_the_end_does_not(tiny_llama):
    ids = torch.randint(3, 128, (1, 44), generator=torch.Generator().manual_seed(0))
    config = tiny_llama.config
    token = 2 * 4 * config.num_key_value_heads * config.head_dim  # bytes of one in one layer

    def watched(**slots):
        return run(tiny_llama, slots, ids[:, :40], ids[:, 40:], Recording(-1, 0))

    assert run(tiny_llama, {}, ids[:, :40], ids[:, 40:]).peak_kv_bytes is None
    assert watched().peak_kv_bytes == watched().kv_bytes == token * 44 * 2
    # The second layer's prompt is whole while ten slots are left of the first one's.
    assert watched(cache="window:budget=10,sinks=2").peak_kv_bytes == token * (40 + 10)
    # Codes are unpacked for one layer at a time.
    coded = watched(cache="rotate_kv:bits=4,group=8")
    assert coded.peak_kv_bytes - coded.kv_bytes == pytest.approx(token * 44, rel=0.03)


def test_a_question_held_back_changes_nothing_without_a_policy(tiny_llama):
    prompt = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    whole = answer(tiny_llama, {}, prompt, 6)
    assert whole == answer(tiny_llama, {}, prompt, 6, held_back=7) and len(whole) == 6
    with torch.no_grad():
        expected = tiny_llama.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert whole == expected[0, 40:].tolist()


def test_a_policy_has_compressed_before_the_question_comes(tiny_llama, monkeypatch):
    seen, score = [], SnapKV.score

    def watched(self, q, k, notes, *, scale):
        seen.append((q.shape[2], k.shape[2]))
        return score(self, q, k, notes, scale=scale)

    monkeypatch.setattr(SnapKV, "score", watched)
    prompt = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    slots = {"cache": "snapkv:budget=12,window=4,pool=3"}
    answer(tiny_llama, slots, prompt, 2, held_back=7)
    assert seen[0] == (33, 33)


def test_recorded_mass_is_the_dense_mass_on_what_was_read():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 48, 8), torch.randn(1, 1, 48, 8), torch.randn(1, 1, 48, 8)
    seen: list[Record] = []
    band = create("sink_window:window=8,sinks=2,block=8")
    band(q, k, v, call=Call(record=seen.append))
    logits = (q @ k.transpose(-1, -2)) / 8**0.5
    at = torch.arange(48)
    past = at[:, None] >= at
    kept = past & ((at[:, None] - at < 8) | (at < 2))
    weights = logits.masked_fill(~past, -torch.inf).softmax(-1)
    assert seen[0].retained_mass == pytest.approx(float((weights * kept).sum(-1).mean()), abs=1e-5)
    blocks = seen[0].layout.to_bool()[0, 0].repeat_interleave(8, 0).repeat_interleave(8, 1)
    share = float((blocks & past).sum() / past.sum())
    assert seen[0].density == pytest.approx(share)


def test_a_block_map_shows_shares_and_what_is_not_visible():
    assert block_map(full_layout(256, 256, 64), 0) == [
        [1.0 if j <= i else None for j in range(4)] for i in range(4)
    ]
    chosen = causal_map((256, 256), (64, 64))
    chosen[2, 1] = False
    picture = block_map(from_map(chosen[None, None], 64, (256, 256)), 0)
    assert picture[2] == [1.0, 0.0, 1.0, None]
    fine = block_map(full_layout(8192, 8192, 16), 0)
    assert len(fine) == len(fine[0]) == 64 and fine[63][0] == 1.0


def test_a_needle_prompt_hides_the_key_where_it_says(builtin):
    _, tokenizer = builtin
    hay = torch.full((1, 400), tokenizer("x", add_special_tokens=False)["input_ids"][0])
    for depth in (0.0, 0.5, 1.0):
        key = needles.pass_key(depth, 0)
        prompt = needles.needle_prompt(tokenizer, hay, depth, key, 300)
        text = tokenizer.decode(prompt[0])
        assert prompt.shape == (1, 300) and text.count(key) == 2
        before = text[: text.index("\n\nThe pass key is")]
        assert abs(before.count("x") / text.count("x") - depth) < 0.05
        assert text.endswith("The pass key is")
    assert needles.answered(" 48213. Then") == "48213" and needles.answered("none") == ""
    with pytest.raises(ValueError, match="needs more than"):
        needles.needle_prompt(tokenizer, hay, 0.5, "12345", 10)


def made_up(tmp_path, rows):
    """Results of made-up measurements: spec -> (prefill seconds, perplexity, kl, needle)."""
    specs = list(rows)
    data = {
        "schema": "foveate.compare/2",
        "created": "2026-01-01T00:00:00+00:00",
        "settings": {
            "specs": specs,
            "lengths": [100],
            "decode_tokens": 8,
            "repeats": 1,
            "needle_depths": [0.5],
            "max_loss": 1.0,
            "max_kl": 0.05,
        },
        "mechanisms": [
            {"spec": s, "python": f"use {s}", "selection_causal": s != "peeks"} for s in specs
        ],
    }
    results = Results.open(tmp_path, data)
    for spec, (seconds, loss, kl, hit) in rows.items():
        judged = {"perplexity": loss, "kl": kl, "top1": 1.0, "positions": 9}
        times = {"prefill_seconds": seconds, "dense_prefill_seconds": 10.0}
        times |= {"decode_seconds": 1.0, "dense_decode_seconds": 1.0, "decode_tokens": 8}
        nothing = {"prefill": None, "decode": None}
        of = {"spec": spec, "tokens": 100}
        results.add({"kind": "timing", "repeat": 0} | of | times)
        results.add(
            {"kind": "quality", "prefill": judged, "decode": judged, "peak_kv_bytes": 70}
            | of
            | {"kv_bytes": 54, "dense_kv_bytes": 108, "density": nothing, "retained_mass": nothing}
        )
        results.add({"kind": "needle", "depth": 0.5, "hit": hit} | of)
    summarise(results)
    return results.data


def test_the_winner_is_the_fastest_that_keeps_the_quality(tmp_path):
    data = made_up(
        tmp_path,
        {
            "dense": (10.0, 12.0, 0.0, True),
            "fast_but_worse": (2.0, 13.0, 0.04, True),
            "fast_but_far": (3.0, 12.0, 0.4, True),
            "fast_but_forgets": (4.0, 12.0, 0.01, False),
            "good": (5.0, 12.1, 0.01, True),
            "slower": (8.0, 12.0, 0.001, True),
            "beaten": (9.0, 12.0, 0.02, True),
        },
    )
    assert data["complete"] and data["winner"]["spec"] == "good"
    assert data["winner"]["python"] == "use good"
    front = {r["spec"] for r in data["summary"] if r["pareto"]}
    # "good" is no point of the front: one that forgets the needle is faster and as close.
    assert front == {"dense", "slower", "fast_but_worse", "fast_but_forgets"}
    good = next(r for r in data["summary"] if r["spec"] == "good")
    assert good["prefill_speedup"]["median"] == 2.0 and good["kv_ratio"] == 0.5
    assert good["end_to_end_speedup"]["median"] == pytest.approx(11 / 6)
    assert good["prefill_quality"]["perplexity_change"] == pytest.approx(100 * (12.1 / 12 - 1))
    assert good["kv_bytes_per_token"] == 0.5 and good["peak_kv_bytes"] == 70
    assert good["by_length"] == [{k: good[k] for k in good["by_length"][0]}]


def test_dense_wins_when_nothing_is_faster_within_the_loss(tmp_path):
    rows = {"dense": (10.0, 12.0, 0.0, True), "slow": (11.0, 12.0, 0.0, True)}
    data = made_up(tmp_path, rows)
    assert data["winner"]["spec"] == "dense"
    assert "no mechanism" in data["winner"]["reason"]


def test_a_mechanism_that_sees_later_tokens_is_marked(tmp_path):
    rows = {"dense": (10.0, 12.0, 0.0, True), "peeks": (5.0, 12.0, 0.0, True)}
    notes = {r["spec"]: r["notes"] for r in made_up(tmp_path, rows)["summary"]}
    assert notes["dense"] == [] and notes["peeks"][0].startswith("choice sees later tokens")


def test_a_plan_that_changed_under_its_name_is_measured_again(tmp_path):
    def opened(plan):
        entries = [{"spec": "dense", "plan_sha256": None}, {"spec": "p", "plan_sha256": plan}]
        data = {"schema": "foveate.compare/2", "created": "", "settings": {}}
        return Results.open(tmp_path, data | {"mechanisms": entries})

    first = opened("a")
    for spec in ("dense", "p"):
        first.add({"kind": "quality", "spec": spec})
    assert len(opened("a").data["measurements"]) == 2
    assert [m["spec"] for m in opened("b").data["measurements"]] == ["dense"]
