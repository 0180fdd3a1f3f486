import math

import pytest
import torch

import foveate
from foveate import ops
from grid_checks import (
    check_grid,
    check_made_fast,
    check_records,
    check_refusals,
    coordinates,
    with_text,
)
from sparse_checks import qkv


def disc_keep(shape, radius):
    at = coordinates(shape)
    return (at[:, None] - at).square().sum(-1) < radius**2


@pytest.mark.parametrize(
    ("shape", "radius", "text", "tile"),
    [((8, 12), 3.0, 5, (4, 4)), ((8, 12), 2.5, 0, (2, 4)), ((3, 6, 6), 2.0, 9, (3, 2, 2))],
)
def test_equals_the_definition(shape, radius, text, tile):
    keep = disc_keep(shape, radius)
    check_grid("clear", keep, shape=shape, text=text, tile=tile, first=True, radius=radius)


def test_a_radius_above_the_diagonal_equals_dense():
    q, k, v = qkv(100)
    radius = math.hypot(7, 11) + 0.1
    out = foveate.create("clear", shape=(8, 12), text=4, radius=radius)(q, k, v, causal=False)
    torch.testing.assert_close(out, ops.attend(q, k, v), atol=1e-5, rtol=1e-4)


def test_image_tokens_see_each_other_or_not_and_text_is_at_the_front():
    made = foveate.create("clear", shape=(8, 12), text=4, radius=3.0)
    seen = made.mask(100, 100, None).to_dense(100, 100)[0, 0]
    assert torch.equal(seen, with_text(disc_keep((8, 12), 3.0), 4, first=True))
    assert torch.equal(seen, seen.T) and seen[:4].all()


def test_cost_is_linear_in_the_area_of_the_image():
    def pairs(side):
        made = foveate.create("clear", shape=(side, side), radius=8.0, tile=(8, 8))
        return int(made.rule().to_layout(side**2, side**2, 64).counts.sum())

    assert 3.8 < pairs(128) / pairs(64) < 4.6
    assert pairs(256) / pairs(128) == pytest.approx(4, abs=0.2)


def test_larger_images_sharpen_the_logits():
    q, k, v = qkv(100)
    options = {"shape": (8, 12), "text": 4, "radius": 3.0}
    same = foveate.create("clear", trained_keys=100, **options)(q, k, v, causal=False)
    torch.testing.assert_close(same, foveate.create("clear", **options)(q, k, v, causal=False))
    sharp = foveate.create("clear", trained_keys=10, **options)(q, k, v, causal=False)
    plain = foveate.create("clear", **options)
    want = plain(q, k, v, causal=False, scale=math.sqrt(math.log(100, 10) / 16))
    torch.testing.assert_close(sharp, want, atol=1e-5, rtol=1e-4)


def test_records_are_those_of_row_order():
    made = foveate.create("clear", shape=(32, 32), radius=4.0, tile=(4, 4), block=16)
    check_records(made, 1024)


@pytest.mark.parametrize("tile", [(8, 8), ()])
def test_long_patterns_are_made_fast(tile):
    made = foveate.create("clear", shape=(256, 256), text=0, radius=16.0, tile=tile)
    check_made_fast(made, 65536)


def test_refuses_what_does_not_fit():
    check_refusals("clear", (16, 16))
    with pytest.raises(ValueError, match="radius must be above 0, got 0"):
        foveate.create("clear", radius=0.0)
    with pytest.raises(ValueError, match="trained_keys must be at least 2, got 1"):
        foveate.create("clear", trained_keys=1)
