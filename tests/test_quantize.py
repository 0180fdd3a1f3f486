import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from foveate.ops.quantize import BITS

# Half a step, and the float32 rounding of a value that lies up to 32767 steps from 0.
HALF = 0.505


def groups_of(x, bits, group, clip=1.0):
    """Plain reference: one group after the other, codes as Python integers, float64 scales."""
    rows = []
    for row in x.reshape(-1, group).double():
        low, high = float(row.min()), float(row.max())
        if low < 0 < high:
            low, high = low * clip, high * clip
        scale = max((high - low) / (2**bits - 1), max(abs(low), abs(high)) / 32767)
        if scale == 0:
            rows.append([0.0] * group)
            continue
        zero = round(-low / scale)
        codes = [min(max(round(float(v) / scale) + zero, 0), 2**bits - 1) for v in row]
        rows.append([scale * (c - zero) for c in codes])
    return torch.tensor(rows).reshape(x.shape)


def matrix_of(n):
    """Hadamard matrix by its definition: the sign counts the bits that i and j share."""
    sign = [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    return torch.tensor(sign, dtype=torch.float64) / n**0.5


def back(x, bits, group, clip=1.0):
    packed = ops.quantize(x, bits, group=group, clip=clip)
    return packed, ops.dequantize(packed, bits, group=group)


@st.composite
def tensors(draw):
    seed = draw(st.integers(0, 2**20))
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]))
    offset = draw(st.sampled_from([0.0, 0.5, -7.0, 1e3]))
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(seed))
    return (x + offset) * scale


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(BITS), st.sampled_from([8, 16, 48]))
def test_values_come_back_within_half_a_step(x, bits, group):
    packed, y = back(x, bits, group)
    step = packed.scale.float().repeat_interleave(group, -1)
    assert bool(((x - y).abs() <= HALF * step).all())


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(BITS))
def test_a_step_is_no_longer_than_the_range_asks(x, bits):
    tiles = x.unflatten(-1, (-1, 16))
    wide = (tiles.amax(-1) - tiles.amin(-1)) / (2**bits - 1)
    narrow = tiles.abs().amax(-1) / 32767
    scale = ops.quantize(x, bits, group=16).scale.float()
    assert bool((scale >= torch.maximum(wide, narrow)).all())
    assert bool((scale <= torch.maximum(wide, narrow) * (1 + 2**-7)).all())


@pytest.mark.parametrize("bits", BITS)
def test_quantize_agrees_with_the_plain_reference(bits):
    torch.manual_seed(0)
    x = torch.randn(5, 64) + torch.linspace(-3, 3, 5)[:, None]
    packed, y = back(x, bits, 16)
    step = packed.scale.float().repeat_interleave(16, -1)
    # The stored step is rounded up by at most 2^-7 of itself, which may move a value by one code.
    assert bool(((y - groups_of(x, bits, 16)).abs() <= 1.02 * step).all())
    assert (y - x).norm() <= 1.02 * (groups_of(x, bits, 16) - x).norm()


@pytest.mark.parametrize("bits", BITS)
def test_codes_take_their_true_number_of_bits(bits):
    packed = ops.quantize(torch.randn(4, 7, 64), bits, group=16)
    assert packed.codes.dtype == torch.uint8
    assert packed.codes.shape == (4, 7, 64 * bits // 8)
    held = sum(t.untyped_storage().nbytes() for t in packed)
    assert held == 4 * 7 * ops.quantized_bytes(64, bits, group=16)


@pytest.mark.parametrize("bits", BITS)
def test_packing_keeps_every_code_in_its_place(bits):
    levels = 2**bits
    codes = torch.randint(levels, (6, 40), generator=torch.Generator().manual_seed(1))
    codes[:, 0], codes[:, 1] = 0, levels - 1
    # With ends 0 and levels-1 the step is 1, so that codes and values are the same numbers.
    packed, y = back(codes.float(), bits, 40)
    assert torch.equal(y, codes.float())
    assert torch.equal(packed.scale, torch.ones(6, 1, dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", BITS)
def test_values_inside_the_clipped_range_come_back_within_half_a_step(bits):
    x = torch.linspace(-1, 1, 32)[None]
    packed, y = back(x, bits, 32, clip=0.8)
    inside = x.abs() <= 0.8
    assert float((x - y)[inside].abs().max()) <= HALF * float(packed.scale)


def test_clipping_cuts_what_lies_outside():
    y = back(torch.linspace(-1, 1, 32)[None], 8, 32, clip=0.8)[1]
    torch.testing.assert_close(y.aminmax().max, torch.tensor(0.8), rtol=0.01, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", BITS)
def test_a_group_of_one_sign_is_not_clipped(sign, bits):
    x = sign * torch.linspace(50, 51, 32)[None]
    packed, y = back(x, bits, 32, clip=0.8)
    assert float((x - y).abs().max()) <= HALF * float(packed.scale)
    assert not 0 <= int(packed.zero) < 2**bits


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4, 1e-38])
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_group_comes_back(value, bits):
    x = torch.full((2, 16), value)
    _, y = back(x, bits, 16)
    torch.testing.assert_close(y, x, rtol=2e-5, atol=1e-37)


def test_groups_do_not_touch_each_other():
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    loud = torch.cat((x[:, :16], 100 * x[:, 16:]), -1)
    assert torch.equal(back(x, 4, 16)[1][:, :16], back(loud, 4, 16)[1][:, :16])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tile", [(8, 1), (16, 1), (2, 8), (4, 40), (1, 8)])
def test_a_tile_is_a_group(tile, bits):
    make = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 40, generator=make) * torch.linspace(0.1, 9, 40)
    packed, y = back(x, bits, tile)
    tokens, channels = tile
    assert packed.scale.shape == packed.zero.shape == (2, 16 // tokens, 40 // channels)
    assert packed.codes.shape == (2, 16, 40 * bits // 8)
    for lo in range(0, 16, tokens):
        for left in range(0, 40, channels):
            part = (..., slice(lo, lo + tokens), slice(left, left + channels))
            # The same numbers as one row of channels that form a group.
            row = x[part].flatten(1)
            assert torch.equal(y[part].flatten(1), back(row, bits, row.shape[1])[1])


def test_one_loud_channel_costs_the_others_nothing_in_groups_of_tokens():
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    loud = x.clone()
    loud[:, 3] *= 100
    rest = [c for c in range(16) if c != 3]
    assert torch.equal(back(x, 2, (32, 1))[1][:, rest], back(loud, 2, (32, 1))[1][:, rest])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bits": 4, "group": (3, 8)},
            r"group must divide the tokens, got groups of 3 .*\(2, 40\)",
        ),
        ({"bits": 4, "group": (2, 7)}, "group must divide the 40 channels, got 7"),
        ({"bits": 4, "group": (0, 8)}, "group must be at least 1, got 0"),
        ({"bits": 5, "group": 8}, "bits must be one of"),
        ({"bits": 4, "group": 7}, "group must divide the 40 channels, got 7"),
        ({"bits": 4, "group": 8, "clip": 0.0}, "clip must be"),
        ({"bits": 4, "group": 8, "clip": 1.5}, "clip must be"),
    ],
)
def test_bad_options_are_named(options, message):
    bits = options.pop("bits")
    with pytest.raises(ValueError, match=message):
        ops.quantize(torch.zeros(2, 40), bits, **options)


def test_channels_must_fill_whole_bytes():
    with pytest.raises(ValueError, match="3 bits need a multiple of 8 channels, got 12"):
        ops.quantize(torch.zeros(2, 12), 3, group=4)
    with pytest.raises(TypeError, match="floating"):
        ops.quantize(torch.zeros(2, 8, dtype=torch.int64), 4, group=4)


@pytest.mark.parametrize("n", [1, 2, 16, 64, 128, 256, 512])
def test_hadamard_is_the_matrix_of_its_definition(n):
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ops.hadamard(x), x @ matrix_of(n))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(0, 1000))
def test_hadamard_is_its_own_inverse_and_keeps_lengths(n, seed):
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(seed))
    y = ops.hadamard(x)
    torch.testing.assert_close(ops.hadamard(y), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_hadamard_of_other_sizes_works_in_blocks():
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    whole = torch.block_diag(*[matrix_of(32)] * 3).float()
    torch.testing.assert_close(ops.hadamard(x), x @ whole)


def test_hadamard_spreads_an_outlier_over_all_channels():
    x = torch.zeros(64)
    x[5] = 8.0
    torch.testing.assert_close(ops.hadamard(x).abs(), torch.ones(64))


def test_hadamard_refuses_integers():
    with pytest.raises(TypeError, match="floating"):
        ops.hadamard(torch.zeros(4, dtype=torch.int64))
