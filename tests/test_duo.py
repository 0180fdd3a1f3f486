import pytest
import torch

import foveate
from attached import check_bytes, prompt
from foveate.analysis.base import Record
from tiny_models import build


def scores_of(policy, n, heads):
    return policy.score(torch.zeros(1, heads, 1, 8), torch.zeros(1, heads, n, 8), {}, scale=None)


def test_full_heads_keep_everything_others_sinks_and_recent_tokens():
    policy = foveate.create("duo", budget=6, sinks=2, full=(1,))
    kept = policy.keep(scores_of(policy, 20, 3))
    assert kept[1].all()
    for head in (0, 2):
        assert kept[head].nonzero()[:, 0].tolist() == [0, 1, 16, 17, 18, 19]


def test_heads_that_are_not_there_are_refused():
    policy = foveate.create("duo:budget=6,full=0/3")
    with pytest.raises(ValueError, match="keeps kv head 3 full, but the layer has 3"):
        policy.keep(scores_of(policy, 20, 3))
    for full in ((-1,), (1, 1)):
        with pytest.raises(ValueError, match="full must name different kv heads"):
            foveate.create("duo", full=full)


@pytest.mark.parametrize("full", ["0", "1", "0/1"])
@pytest.mark.parametrize("buffer", [0, 5])
def test_bytes_are_those_claimed(full, buffer):
    policy = foveate.create(f"duo:budget=12,buffer={buffer},full={full}")
    check_bytes(build("llama"), policy, 30)


@torch.no_grad()
def test_streaming_heads_are_those_of_a_window_and_all_full_is_dense():
    model, ids = build("llama"), prompt(40)

    def decoded(cache):
        with foveate.attach(model, cache=cache):
            return model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)

    def logits(cache):
        with foveate.attach(model, cache=cache):
            out = model(ids, use_cache=True)
            return model(ids[:, :1], past_key_values=out.past_key_values).logits

    none = "duo:budget=12,buffer=3,full="
    assert torch.equal(logits(none), logits("window:budget=12,buffer=3"))
    torch.testing.assert_close(logits("duo:budget=12,full=0/1"), logits(None), atol=1e-5, rtol=1e-4)
    assert torch.equal(decoded("duo:budget=12,full=0/1"), decoded(None))
    some = logits("duo:budget=12,buffer=3,full=0")
    assert not torch.allclose(some, logits(none), atol=1e-4)
    assert not torch.allclose(some, logits(None), atol=1e-4)


def test_scores_of_heads_make_a_plan_of_caches():
    score = torch.zeros(3, 4)
    score[0, 1], score[2, 3], score[2, 2], score[2, 0] = 3.0, 2.0, 1.0, 0.5
    record = Record("a", {"x": score}, {"x": ("layer", "head")}, "x")
    assert record.cache_plan(2, 2, 16) == [
        "duo:budget=16,full=0", "window:budget=16", "duo:budget=16,full=1",
    ]  # fmt: skip
    assert record.cache_plan(4, 2, 16)[2] is None
    model, ids = build("llama"), prompt(40)
    wide = Record("a", {"x": torch.rand(4, 4)}, {"x": ("layer", "head")}, "x")
    with foveate.attach(model, cache=wide.cache_plan(3, 2, 12)), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        held = [
            n for x in cache.layers for n in (x.slots.lengths if hasattr(x, "slots") else [40] * 2)
        ]
        assert set(held) == {12, 40} and held.count(40) == len(wide.kv_heads(3, 2))
