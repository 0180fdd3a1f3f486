import pytest
import torch

import foveate
from foveate import ops
from grid_checks import check_grid, check_made_fast, check_records, check_refusals
from ops_tools import largest_output
from sparse_checks import qkv


def nearest(n, window, dilation=1):
    """Each query's `window` keys of its residue class that are nearest, shifted at borders."""
    keep = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        own = [j for j in range(n) if j % dilation == i % dilation]
        first = min(max(own.index(i) - window // 2, 0), len(own) - window)
        keep[i, own[first : first + window]] = True
    return keep


@pytest.mark.parametrize(
    ("shape", "window", "dilation", "text", "tile"),
    [
        ((40,), (7,), (1,), 3, (8,)),
        ((40,), (6,), (3,), 0, (8,)),
        ((8, 12), (3, 5), (1, 1), 5, (4, 4)),
        ((8, 12), (3, 4), (2, 3), 0, (4, 4)),
        ((3, 6, 6), (3, 3, 5), (1, 2, 1), 4, (3, 2, 2)),
    ],
)
def test_equals_the_definition(shape, window, dilation, text, tile):
    keep = torch.ones(1, 1)
    for axis in zip(shape, window, dilation, strict=True):
        keep = torch.kron(keep, nearest(*axis).float())
    options = {"window": window, "dilation": dilation}
    check_grid("fna", keep.bool(), shape=shape, text=text, tile=tile, **options)


def test_is_generalized_neighborhood_attention_of_stride_one():
    q, k, v = qkv(96)
    options = {"shape": (8, 12), "window": 5, "causal_axes": (1,)}
    fna, gna = (foveate.create(name, **options)(q, k, v, causal=False) for name in ("fna", "gna"))
    assert torch.equal(fna, gna)


def test_full_window_equals_dense_and_window_one_returns_the_values():
    q, k, v = qkv(96)
    full = foveate.create("fna", shape=(8, 12), window=(8, 12))(q, k, v, causal=False)
    torch.testing.assert_close(full, ops.attend(q, k, v), atol=1e-5, rtol=1e-4)
    one = foveate.create("fna", shape=(8, 12), window=1)(q, k, v, causal=False)
    torch.testing.assert_close(one, v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-4)


def test_no_neighborhood_is_held_in_memory():
    q, k, v = qkv(64 * 64, heads=2, kv_heads=1)
    made = foveate.create("fna", shape=(64, 64), window=15, tile=(8, 8))
    with ops.backend("torch"):
        held = largest_output(lambda: made(q, k, v, causal=False))
    assert held < 2 * 4096 * 15 * 15


def test_records_are_those_of_row_order():
    made = foveate.create("fna", shape=(32, 32), window=7, tile=(4, 4), block=16)
    check_records(made, 1024)


def test_long_patterns_are_made_fast():
    check_made_fast(foveate.create("fna", shape=(256, 256), window=13, tile=(8, 8)), 65536)
    check_made_fast(foveate.create("fna", shape=(256, 256), window=13, dilation=4), 65536)


def test_refuses_what_does_not_fit():
    check_refusals("fna", (16, 16))
    with pytest.raises(ValueError, match="window 9"):
        foveate.create("fna", shape=(8, 12), window=9)
