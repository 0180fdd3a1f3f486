"""Keys and values in fewer bits the older they are."""

import pytest
import torch

from foveate import ops
from foveate.cache.saq import SAQ

HEADS, DIM = 2, 32


def tokens(count, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(1, HEADS, count, DIM, generator=made), torch.randn(
        1, HEADS, count, DIM, generator=made
    )


def held_after(policy, k, v, cuts):
    """What is held after the tokens came in pieces that end at the cuts."""
    held = policy.empty(k, v, layer=0)
    for lo, hi in zip((0, *cuts), (*cuts, k.shape[2]), strict=True):
        held = policy.extended(held, k[:, :, lo:hi], v[:, :, lo:hi])
    return held


def read(policy, held):
    """All keys held, oldest first, and the bits of each."""
    parts, bits = [held.first[0]], [16] * held.first[0].shape[2]
    for width, level in reversed(list(zip(policy.bits[1:], held.levels, strict=True))):
        if level is not None:
            parts.append(ops.dequantize(level[0], width, group=(policy.group, 1)))
            bits += [width] * parts[-1].shape[2]
    parts.append(held.newest[0])
    return torch.cat(parts, 2), bits + [16] * held.newest[0].shape[2]


STAIRS = SAQ(bits=(16, 8, 4, 2), block=8, group=8, recent=0, first=0)


@pytest.mark.parametrize("policy", [STAIRS, SAQ(bits=(16, 2), block=16, group=8, recent=5)])
def test_a_prompt_is_held_as_tokens_that_came_one_by_one(policy):
    k, v = tokens(75)
    whole = held_after(policy, k, v, ())
    for cuts in (range(1, 75), (7, 30, 31)):
        pieces = held_after(policy, k, v, tuple(cuts))
        for a, b in zip(whole.first + whole.newest, pieces.first + pieces.newest, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(whole.levels, pieces.levels, strict=True):
            for x, y in zip(a, b, strict=True):
                assert all(torch.equal(s, t) for s, t in zip(x, y, strict=True))


def test_bits_fall_with_age_one_level_a_block():
    k, v = tokens(8 * 9 + 3)
    for count in range(1, k.shape[2] + 1):
        keys, bits = read(STAIRS, held_after(STAIRS, k[:, :, :count], v[:, :, :count], ()))
        assert keys.shape[2] == count
        blocks = count // 8
        aged = [(2, 4, 8)[max(0, 3 - age)] if age <= 3 else 2 for age in range(blocks, 0, -1)]
        assert bits == [width for width in aged for _ in range(8)] + [16] * (count % 8)


def test_errors_do_not_shrink_with_age():
    """Each level of 8, 4, 2 bits can say what the next one says, so steps down only lose."""
    k, v = tokens(8 * 6)
    keys, bits = read(STAIRS, held_after(STAIRS, k, v, ()))
    gap = (keys - k).abs().mean((0, 1, 3))
    at = {width: float(gap[torch.tensor(bits) == width].mean()) for width in (8, 4, 2)}
    assert 0 < at[8] < at[4] < at[2]
    assert float(gap[torch.tensor(bits) == 16].sum()) == 0


def test_attention_reads_what_is_held():
    policy = SAQ(bits=(16, 8, 4), block=8, group=8, recent=3, first=2)
    k, v = tokens(60)
    held = held_after(policy, k[:, :, :55], v[:, :, :55], ())
    q = torch.randn(1, 6, 5, DIM, generator=torch.Generator().manual_seed(1))
    out = policy.attend(q, held, k[:, :, 55:], v[:, :, 55:], scale=None, softcap=None)

    keys = torch.cat((read(policy, held)[0], k[:, :, 55:]), 2)
    values = [held.first[1]]
    for width, level in reversed(list(zip(policy.bits[1:], held.levels, strict=True))):
        values.append(ops.dequantize(level[1], width, group=8))
    values = torch.cat((*values, held.newest[1], v[:, :, 55:]), 2)
    want = ops.attend(q, keys, values, causal=True)
    torch.testing.assert_close(out, want, atol=2e-3, rtol=0)


def test_what_is_held_is_not_held_by_a_view():
    k, v = tokens(200)
    held = held_after(SAQ(block=32, group=16, recent=10), k, v, ())
    for x in held.newest + held.first:
        assert x.untyped_storage().nbytes() == x.nbytes


def test_at_two_bits_a_narrower_range_holds_normal_numbers_better():
    k, v = tokens(32 * 20)
    off = {}
    for clip in (None, 1.0, 0.7, 0.4):
        policy = SAQ(bits=(16, 2), block=32, recent=0, first=0, clip=clip)
        off[clip] = float((read(policy, held_after(policy, k, v, ()))[0] - k).square().mean())
    assert off[None] == off[0.7] < 0.75 * off[1.0] and off[0.7] < off[0.4]
    four = [SAQ(block=32, recent=0, first=0, clip=clip) for clip in (None, 1.0)]
    assert torch.equal(*(read(x, held_after(x, k, v, ()))[0] for x in four))


@pytest.mark.parametrize("bits", [(16,), (16, 4), (16, 8, 4, 2)])
@pytest.mark.parametrize("count", [3, 20, 75])
def test_claims_the_bytes_it_holds(bits, count):
    policy = SAQ(bits=bits, block=8, group=8, recent=3, first=2)
    held = held_after(policy, *tokens(count), ())
    found = sum(x.untyped_storage().nbytes() for x in policy.tensors(held))
    assert found == policy.claimed_bytes(count, count, kv_heads=HEADS, dim=DIM, itemsize=4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": (8, 4)}, "fall from 16"),
        ({"bits": (16, 4, 4)}, "fall from 16"),
        ({"bits": (16, 5)}, "fall from 16"),
        ({"bits": ()}, "fall from 16"),
        ({"block": 48, "group": 32}, "group must divide the block"),
        ({"recent": -1}, "recent must be at least 0"),
        ({"block": 0}, "block"),
        ({"clip": 0.0}, "clip must be above 0 and at most 1, got 0.0"),
    ],
)
def test_refuses_bad_options(options, said):
    with pytest.raises(ValueError, match=said):
        SAQ(**options)


def test_refuses_values_that_groups_do_not_fit():
    k = torch.randn(1, 1, 4, 24)
    with pytest.raises(ValueError, match="does not divide the 24 value channels"):
        SAQ(group=16, block=16).extended(SAQ().empty(k, k, layer=0), k, k)
