import pytest
import torch
from transformers import DynamicCache

import foveate
from attached import check_bytes, check_differs_from_plain, prompt

GROUP, DIM = 2, 8


def case(n, heads=2, seed=0):
    torch.manual_seed(seed)
    return torch.randn(1, GROUP * heads, n, DIM), torch.randn(1, heads, n, DIM)


def received(q, k):
    """Plain reference: attention every token received from all queries, (Hkv, n)."""
    n = k.shape[2]
    total = torch.zeros(k.shape[1], n)
    for head in range(q.shape[1]):
        h = head // GROUP
        for i in range(n):
            logits = k[0, h, : i + 1] @ q[0, head, i] * DIM**-0.5
            total[h, : i + 1] += torch.softmax(logits, 0) / GROUP
    return total


def test_scores_of_a_prompt_and_steps_are_the_attention_received():
    q, k = case(30)
    policy, notes = foveate.create("h2o", budget=12), {"score": torch.zeros(2, 0)}
    seen = 0
    for end in (20, *range(21, 31)):
        score = torch.nn.functional.pad(notes["score"], (0, end - seen))
        part = (q[:, :, seen:end], k[:, :, :end])
        notes = policy.observe(*part, {"score": score}, scale=None)
        seen = end
    torch.testing.assert_close(notes["score"], received(q, k))


def test_keeps_the_recent_half_and_the_heavy_hitters():
    q, k = case(40)
    total = received(q, k)
    policy = foveate.create("h2o", budget=12)
    kept = policy.keep(policy.score(q, k, {"score": total}, scale=None))
    for h in range(2):
        best = total[h, :34].topk(6).indices.sort().values.tolist()
        assert kept[h].nonzero()[:, 0].tolist() == [*best, *range(34, 40)]


@torch.no_grad()
def test_every_step_drops_the_old_token_of_the_lowest_score(tiny_llama):
    cache, ids = DynamicCache(), prompt(36)
    with foveate.attach(tiny_llama, cache="h2o:budget=10,buffer=0"):
        tiny_llama(ids[:, :24], past_key_values=cache)
        for i in range(24, 36):
            before = cache.layers[0].slots.rows(1)[0]
            tiny_llama(ids[:, i : i + 1], past_key_values=cache)
            after = cache.layers[0].slots.rows(1)[0]
            assert after.lengths == [10, 10]
            kept = after.padded("k")[:, :-1]
            gone = ~(before.padded("k")[:, :, None] == kept[:, None]).all(-1).any(2)
            assert gone.sum(1).tolist() == [1, 1]
            # five recent tokens stay, the new one among them
            assert not bool(gone[:, -4:].any())


def test_acts_and_holds_what_it_claims(tiny_llama):
    check_differs_from_plain(tiny_llama, cache="h2o:budget=8")
    check_bytes(tiny_llama, foveate.create("h2o", budget=8, buffer=3), 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be at least 1"),
        ({"recent": 1.0}, "recent must be at least 0 and below 1, got 1.0"),
        ({"buffer": -1}, "buffer must be at least 0, got -1"),
        ({"floor": 1.5}, "floor must be above 0 and at most 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        foveate.create("h2o", **options)
