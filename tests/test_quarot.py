"""Keys and values rotated head by head, then quantised token by token."""

import dataclasses

import pytest
import torch

import foveate
from foveate import ops
from foveate.cache.quarot import QuaRot

HEADS, DIM = 2, 32
CODED = QuaRot(bits=(16, 4), block=8, group=16, recent=3, first=2)


def tokens(count, seed=0):
    """Keys with two outlier channels, and values."""
    made = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, HEADS, count, DIM, generator=made) for _ in "kv")
    k[..., 5] *= 20
    k[..., 20] += 15
    return k, v


def held_after(policy, k, v, cuts=()):
    """What is held after the tokens came in pieces that end at the cuts."""
    held = policy.empty(k, v, layer=0)
    for lo, hi in zip((0, *cuts), (*cuts, k.shape[2]), strict=True):
        held = policy.extended(held, k[:, :, lo:hi], v[:, :, lo:hi])
    return held


def read(held, bits=4):
    """All keys and values held, in order, rotated back."""
    ((codes_k, codes_v),) = held.levels
    return [
        ops.hadamard(torch.cat((first, ops.dequantize(codes, bits, group=16), newest), 2))
        for first, codes, newest in zip(held.first, (codes_k, codes_v), held.newest, strict=True)
    ]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attention_is_that_over_what_is_held(length, softcap):
    k, v = tokens(50 + length)
    q = torch.randn(1, 6, length, DIM, generator=torch.Generator().manual_seed(1))
    held = held_after(CODED, k[:, :, :50], v[:, :, :50])
    new = k[:, :, 50:], v[:, :, 50:]
    out = CODED.attend(q, held, *new, scale=0.05, softcap=softcap)
    keys, values = (torch.cat(x, 2) for x in zip(read(held), new, strict=True))
    want = ops.attend(q, keys, values, causal=True, scale=0.05, softcap=softcap)
    torch.testing.assert_close(out, want, atol=5e-3, rtol=0)


def test_a_channel_comes_back_within_half_a_step_once_rotated():
    k, v = tokens(42)
    for x, back in zip((k, v), read(held_after(CODED, k, v)), strict=True):
        away = (ops.hadamard(x) - ops.hadamard(back)).abs().unflatten(3, (2, 16)).amax(-1)
        tiles = ops.hadamard(x).unflatten(3, (2, 16))
        step = (tiles.amax(-1) - tiles.amin(-1)) / 15 * (1 + 2**-7)
        assert bool((away <= step / 2 + 1e-4).all())
        assert float(away.max()) > 0.02


def test_exact_tokens_come_back_as_they_were():
    k, v = tokens(42)
    for x, back in zip((k, v), read(held_after(CODED, k, v)), strict=True):
        for part in (slice(0, 2), slice(-3, None)):
            torch.testing.assert_close(back[:, :, part], x[:, :, part], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [range(1, 42), (7, 30, 31)])
def test_a_prompt_is_held_as_tokens_that_came_one_by_one(cuts):
    k, v = tokens(42)
    for x, y in zip(
        CODED.tensors(held_after(CODED, k, v)),
        CODED.tensors(held_after(CODED, k, v, tuple(cuts))),
        strict=True,
    ):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_rotation_makes_keys_with_outliers_more_exact():
    k, v = tokens(100)
    plain = dataclasses.replace(CODED, rotate=False)
    turned = read(held_after(CODED, k, v))[0] - k
    straight = read(held_after(plain, k, v))[0] - ops.hadamard(k)
    assert float(turned.norm()) < 0.8 * float(straight.norm())


def test_each_token_has_scales_of_its_own():
    ((codes_k, codes_v),) = held_after(CODED, *tokens(42)).levels
    assert codes_k.scale.shape == codes_v.scale.shape == (1, HEADS, 32, 2)


def test_four_bits_take_a_seventh_of_the_plain_bytes():
    claim = foveate.create("quarot", recent=0, first=0).claimed_bytes
    sizes = {"kv_heads": 8, "dim": 128, "itemsize": 4}
    assert 1024 * 2 * 8 * 128 * 4 / claim(1024, 1024, **sizes) == pytest.approx(32 / 4.5)


def test_groups_of_a_token_need_not_fit_a_block():
    assert QuaRot(block=48, group=64).key_tile == (1, 64)
    with pytest.raises(ValueError, match="does not divide the 24 value channels"):
        held_after(QuaRot(group=16, block=16), *(torch.randn(1, 1, 4, 24),) * 2)
