import pytest
import torch

import foveate
from foveate import ops
from grid_checks import check_grid, check_made_fast, check_records, check_refusals
from sparse_checks import qkv


def axis_keep(n, window, stride=1, dilation=1, causal=False):
    """Pairs of one axis, by the rules of the paper, query by query."""
    keep = torch.zeros(n, n, dtype=torch.bool)
    for query in range(n):
        r, i = query % dilation, query // dilation
        length = -(-(n - r) // dilation)
        if causal:
            leader = min(i // stride * stride + stride - 1, length - 1)
            keys = range(max(leader - window + 1, 0), i + 1)
        else:
            leader = min(i // stride * stride + stride // 2, length - 1)
            right = window // 2 + window % 2 - 1
            start = max(leader - window // 2, 0)
            start += min(length - 1 - right - leader, 0)
            keys = range(start, start + window)
        keep[query, [r + dilation * j for j in keys]] = True
    return keep


def grid_keep(shape, window, stride=None, dilation=None, causal_axes=()):
    """Pairs of a grid: those that every axis shows."""
    keep = torch.ones(1, 1)
    for axis, n in enumerate(shape):
        options = (stride or (1,) * 3)[axis], (dilation or (1,) * 3)[axis], axis in causal_axes
        keep = torch.kron(keep, axis_keep(n, window[axis], *options).float())
    return keep.bool()


CASES = [
    ({"shape": (48,), "window": (9,), "stride": (4,)}, 5, (16,)),
    ({"shape": (8, 12), "window": (3, 6), "stride": (2, 5)}, 3, (4, 4)),
    ({"shape": (8, 12), "window": (4, 3), "dilation": (2, 3)}, 0, (2, 6)),
    ({"shape": (8, 12), "window": (4, 4), "causal_axes": (0,)}, 7, (4, 4)),
    ({"shape": (4, 6, 4), "window": (2, 3, 4), "stride": (1, 3, 2)}, 2, (2, 3, 2)),
]


@pytest.mark.parametrize(("options", "text", "tile"), CASES)
def test_equals_the_definition(options, text, tile):
    check_grid("gna", grid_keep(**options), text=text, tile=tile, **options)


def test_full_window_equals_dense():
    q, k, v = qkv(100)
    out = foveate.create("gna", shape=(8, 12), text=4, window=(8, 12))(q, k, v, causal=False)
    torch.testing.assert_close(out, ops.attend(q, k, v), atol=1e-5, rtol=1e-4)


def test_stride_of_a_window_is_attention_inside_blocks():
    q, k, v = qkv(96)
    out = foveate.create("gna", shape=(8, 12), window=4, stride=4, tile=(4, 4), block=16)(
        q, k, v, causal=False
    )
    order = ops.tile_order((8, 12), (4, 4)).view(6, 16)
    for box in order:
        want = ops.attend(*(x[:, :, box] for x in (q, k, v)))
        torch.testing.assert_close(out[:, :, box], want, atol=1e-5, rtol=1e-4)


def test_density_reaches_the_bound_where_windows_strides_and_tiles_fit():
    options = {"shape": (32, 32), "window": 8, "tile": (8, 8)}
    fitting = foveate.create("gna", stride=8, **options).rule().to_layout(1024, 1024, 64)
    assert fitting.density(False) == (8 / 32) ** 2
    for stride in (1, 4):
        loose = foveate.create("gna", stride=stride, **options).rule().to_layout(1024, 1024, 64)
        assert loose.density(False) > (8 / 32) ** 2


def test_records_are_those_of_row_order():
    made = foveate.create("gna", shape=(32, 32), text=64, window=8, tile=(4, 8), block=32)
    check_records(made, 1024 + 64)


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (256, 256), "window": 32, "tile": (8, 8)},
        {"shape": (256, 256), "window": 32, "stride": 8},
        {"shape": (16, 64, 64), "window": (4, 16, 16), "dilation": (1, 2, 2)},
    ],
)
def test_long_patterns_are_made_fast(options):
    check_made_fast(foveate.create("gna", **options), 65536)
    dilated = {"window": (4, 16, 16), "dilation": 2, "tile": (4, 4, 4)}
    check_made_fast(foveate.create("gna", shape=(16, 64, 64), **dilated), 65536)


def test_refuses_what_does_not_fit():
    check_refusals("gna", (16, 16))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"window": 9}, "window 9"),
        ({"window": (4,)}, "window must have"),
        ({"window": 4, "stride": 5}, "stride must be at most window 4, got 5"),
        ({"window": 4, "dilation": 3}, "dilation 3"),
        ({"window": 4, "causal_axes": (2,)}, "causal_axes must be axes of the grid"),
        ({"window": 4, "tile": (3, 4), "block": 12}, "tile must divide the grid"),
        ({"window": 4, "tile": (8, 4), "block": 48}, "block must be a multiple of the 32 tokens"),
    ],
)
def test_bad_options_are_named(option, words):
    with pytest.raises(ValueError, match=words):
        foveate.create("gna", shape=(8, 12), **option)
