"""Key blocks visited at random, the nearer the likelier."""

import pytest
import torch

import foveate
from attached import check_equals_plain, check_padded_row_equals_row_alone
from foveate import ops
from foveate.attention.base import Call
from foveate.attention.decode.pr_flash import uniform
from sparse_checks import causal_keep, check_common, qkv, softmax_over, tokens_of

BLOCK = 8


def visited(mechanism, q, k, layer=0):
    """Bool map (1, Hq, nQ, nK) of the blocks that are read."""
    return mechanism.select(q, k, Call(layer=layer)).to_bool()


@pytest.mark.parametrize(("lq", "lk"), [(80, 80), (75, 75), (33, 75), (1, 75)])
def test_equals_attention_over_the_visited_blocks(lq, lk):
    q, k, v = qkv(lk, lq, batch=2)
    mechanism = foveate.create("pr_flash", block=BLOCK, rate=0.6)
    keep = tokens_of(mechanism.select(q, k, Call())) & causal_keep(lq, lk)
    assert not keep.expand(1, 4, lq, lk)[0].equal(causal_keep(lq, lk).expand(4, lq, lk))
    torch.testing.assert_close(
        mechanism(q, k, v), softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4
    )


def test_a_rate_of_one_is_dense_attention_and_a_rate_of_zero_the_own_block():
    q, k, v = qkv(75)
    dense = ops.attend(q, k, v, causal=True)
    assert torch.equal(foveate.create("pr_flash", block=BLOCK, rate=1.0)(q, k, v), dense)
    own = torch.arange(75) // BLOCK
    keep = (own[:, None] == own) & causal_keep(75, 75)
    out = foveate.create("pr_flash", block=BLOCK, rate=0.0)(q, k, v)
    torch.testing.assert_close(out, softmax_over(q, k, v, keep), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.9, 0.5, None])
def test_each_distance_is_visited_as_often_as_the_law_says(rate):
    mechanism, blocks, seen = foveate.create("pr_flash", block=1, rate=rate), 60, []
    q, k, _ = qkv(blocks, heads=8, kv_heads=1, dim=2)
    for layer in range(50):
        seen.append(visited(mechanism, q, k, layer))
    share = torch.cat(seen).double().mean((0, 1))
    for distance in (0, 1, 2, 5, 20):
        law = 1 / (1 + distance) if rate is None else rate**distance
        pairs = 400 * (blocks - distance)
        off = float(share.diagonal(-distance).mean()) - law
        assert abs(off) <= 4.5 * (law * (1 - law) / pairs) ** 0.5
    assert float(share.triu(1).sum()) == 0


def test_draws_are_even_and_know_nothing_of_their_neighbours():
    i, j = torch.arange(200)[:, None], torch.arange(200)
    drawn = uniform(3, 1, i, j)
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
    counts = torch.histc(drawn, 20, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 45  # chi square, 19 degrees of freedom
    for other in (drawn.roll(1, 0), drawn.roll(1, 1), drawn.T, uniform(4, 1, i, j)):
        both = torch.stack((drawn.flatten(), other.flatten()))
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.02


def test_heads_layers_and_seeds_draw_on_their_own():
    q, k, _ = qkv(80)
    one = foveate.create("pr_flash", block=BLOCK, rate=0.5)
    here = visited(one, q, k)
    assert not here[0, 0].equal(here[0, 1])
    assert not here.equal(visited(one, q, k, 1))
    assert not here.equal(visited(foveate.create("pr_flash", block=BLOCK, rate=0.5, seed=1), q, k))
    assert here.equal(visited(one, torch.cat([q] * 3), torch.cat([k] * 3)))


def test_decoding_and_later_chunks_visit_the_blocks_of_the_prefill():
    q, k, _ = qkv(79)
    mechanism = foveate.create("pr_flash", block=BLOCK, rate=0.6)
    whole = visited(mechanism, q, k)
    for start in (78, 51, 40):
        own = visited(mechanism, q[:, :, start:], k)
        assert own.equal(whole[:, :, start // BLOCK :])
    step = visited(mechanism, q[:, :, 51:52], k[:, :, :52])
    assert step.equal(whole[:, :, 6:7, :7])


def test_common_claims():
    check_common(foveate.create("pr_flash", block=BLOCK, rate=0.6), *qkv(90, batch=2))


def test_inside_a_model(tiny_llama):
    check_equals_plain(tiny_llama, decode="pr_flash:rate=1.0")
    slots = {"prefill": "pr_flash:block=4,rate=0.5", "decode": "pr_flash:block=4,rate=0.5"}
    check_padded_row_equals_row_alone(tiny_llama, **slots)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, "rate must be None or in"),
        ({"rate": -0.1}, "rate must be None or in"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"block": 0}, "block must be at least 1"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        foveate.create("pr_flash", **options)
