"""Fewer bits, and where four are too many fewer tokens."""

import pytest
import torch
from transformers import DynamicCache

import foveate
from attached import check_bytes, check_padded_row_equals_row_alone, prompt, step_logits
from foveate import ops
from foveate.cache.auto import Auto
from foveate.cache.snapkv import SnapKV

SMALL = "auto:share=0.2,recent=8,window=4,least=16"


def tokens(count, dim=64, dtype=torch.float32):
    made = torch.Generator().manual_seed(count)
    shapes = (6, 2, 2)
    return (torch.randn(1, h, count, dim, generator=made).to(dtype) for h in shapes)


def held_bytes(policy, count, dim=64, dtype=torch.float32):
    """Bytes held after a prompt, over those of its keys and values."""
    q, k, v = tokens(count, dim, dtype)
    at = policy.chosen(q, k, scale=None)
    if at is not None:
        k, v = (x.gather(2, at[None, ..., None].expand(1, -1, -1, dim)) for x in (k, v))
    held = policy.extended(policy.empty(k, v, layer=0), k, v)
    whole = 2 * 2 * count * dim * k.element_size()
    return sum(x.untyped_storage().nbytes() for x in policy.tensors(held)) / whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.5, 0.3, 0.25, 0.125])
@pytest.mark.parametrize("count", [1024, 1100, 3000])
def test_a_prompt_takes_at_most_its_share(count, share, dtype):
    assert 0.75 * min(share, 0.2) <= held_bytes(Auto(share=share), count, 64, dtype) <= share


@pytest.mark.parametrize("share", [0.6, 0.33, 0.21, 0.1])
def test_no_length_takes_more_than_its_share(share):
    """Whatever the rest of the last block."""
    policy, sizes = Auto(share=share), {"kv_heads": 1, "dim": 64, "itemsize": 4}
    for count in range(1024, 1400):
        assert policy.claimed_bytes(count, count, **sizes) <= share * count * 2 * 64 * 4


@pytest.mark.parametrize(
    ("share", "itemsize", "bits", "kept"),
    [
        (1.0, 4, (16,), 1024),
        (0.5, 4, (16, 8), 1024),
        (0.25, 4, (16, 4), 1024),
        (0.6, 2, (16, 8), 1024),
        (0.5, 2, (16, 4), 1024),
        # What 36 exact tokens leave of 256 holds 22 blocks of 32 tokens, of 10 each.
        (0.25, 2, (16, 4), 740),
    ],
)
def test_bits_go_first_and_tokens_only_where_four_bits_are_too_many(share, itemsize, bits, kept):
    policy = Auto(share=share)
    stairs = policy.stairs(64, itemsize)
    assert stairs.bits == bits
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    q, k, _ = tokens(1024, dtype=dtype)
    chosen = policy.chosen(q, k, scale=None)
    assert kept == (1024 if chosen is None else chosen.shape[1])


def test_the_best_voted_tokens_stay_in_order():
    q, k, _ = tokens(600)
    policy = Auto(share=0.1, least=64)
    at = policy.chosen(q, k, scale=None)
    assert (at.diff(dim=1) > 0).all()
    votes = SnapKV(budget=at.shape[1], window=32).score(q, k, {}, scale=None)
    kept = torch.zeros_like(votes, dtype=torch.bool).scatter(1, at, True)
    assert (votes.masked_fill(~kept, torch.inf).amin(1) >= votes.masked_fill(kept, 0).amax(1)).all()
    assert kept[:, -32:].all()


def test_attention_reads_the_tokens_that_stayed():
    """Without a code, at a share that one token more than the least would pass."""
    policy = Auto(share=0.01, recent=64, least=64)
    q, k, v = tokens(90)
    at = policy.chosen(q, k, scale=None)
    kept = [x.gather(2, at[None, ..., None].expand(1, -1, -1, 64)) for x in (k, v)]
    held = policy.extended(policy.empty(k, v, layer=0), *kept)
    got = policy.attend(q[:, :, -1:], held, k[:, :, :1], v[:, :, :1], scale=None, softcap=None)
    want = ops.attend(
        q[:, :, -1:], *(torch.cat((a, b[:, :, :1]), 2) for a, b in zip(kept, (k, v), strict=True))
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_short_prompts_keep_all_their_tokens():
    q, k, _ = tokens(128)
    assert Auto(share=0.01).chosen(q, k, scale=None) is None


def test_in_a_model_it_drops_tokens_holds_what_it_claims_and_knows_no_padding(tiny_llama):
    cache = DynamicCache()
    step_logits(tiny_llama, prompt(60), 50, cache, cache=SMALL)
    held = cache.layers[0].rows[0]
    assert sum(x.shape[2] for x in (held.first[0], held.newest[0])) == 16 + 10 - 8
    check_bytes(tiny_llama, foveate.create(SMALL), 50)
    check_padded_row_equals_row_alone(tiny_llama, cache=SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share must be above 0 and at most 1, got 0.0"),
        ({"share": 1.5}, "share must be above 0"),
        ({"window": 128}, "least must be above the window 128, got 128"),
        ({"recent": 0}, "recent must be at least 1"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Auto(**options)
