import math
from itertools import pairwise

import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from grid_checks import check_made_fast, with_text
from sparse_checks import qkv, softmax_over


def plain_keep(frames, size, sink):
    """Pairs by the rule of the paper, token by token."""
    keep = torch.zeros(frames * size, frames * size, dtype=torch.bool)
    for q in range(frames * size):
        for k in range(frames * size):
            (i, a), (j, c) = divmod(q, size), divmod(k, size)
            e = math.floor(math.log2(max(abs(i - j), 1)))
            near = 2**e <= size and abs(a - c) + 1 <= size / 2**e
            line = abs(i - j) % math.ceil(2**e / size) == 0 and a == c
            keep[q, k] = near or line or (sink and j == 0)
    return keep


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(("shape", "text"), [((8, 3, 4), 5), ((12, 3), 0), ((9, 8), 2)])
def test_equals_the_definition(shape, text, sink):
    size = math.prod(shape[1:])
    q, k, v = qkv(shape[0] * size + text, batch=2)
    keep = with_text(plain_keep(shape[0], size, sink), text)
    m = foveate.create("radial", shape=shape, text=text, sink=sink, block=16)
    want = softmax_over(q, k, v, keep)
    torch.testing.assert_close(m(q, k, v, causal=False), want, atol=1e-5, rtol=1e-4)
    chunk = m(q[:, :, -20:], k, v, causal=False)
    torch.testing.assert_close(chunk, want[:, :, -20:], atol=1e-5, rtol=1e-4)


def test_one_and_two_frames_are_dense():
    q, k, v = qkv(48)
    for shape in ((1, 6, 8), (2, 4, 6)):
        out = foveate.create("radial", shape=shape)(q, k, v, causal=False)
        torch.testing.assert_close(out, ops.attend(q, k, v), atol=1e-5, rtol=1e-4)


def test_density_falls_with_the_number_of_frames():
    densities = []
    for frames in (4, 8, 16, 32):
        q, k, v = qkv(frames * 64)
        m = foveate.create("radial", shape=(frames, 8, 8), block=16)
        records = []
        m(q, k, v, causal=False, call=Call(record=records.append))
        densities.append(records[0].density)
    assert all(later < earlier for earlier, later in pairwise(densities))


def test_first_denoising_steps_and_layers_are_dense():
    q, k, v = qkv(96)
    m = foveate.create("radial", shape=(8, 12), dense_steps=3, dense_layers=(0,))
    dense = ops.attend(q, k, v)
    for step, layer, same in ((2, 1, True), (3, 1, False), (3, 0, True)):
        out = m(q, k, v, causal=False, call=Call(step=step, layer=layer, layers=2))
        assert bool(torch.allclose(out, dense, atol=1e-5)) == same


def test_long_patterns_are_made_fast():
    check_made_fast(foveate.create("radial", shape=(16, 64, 64)), 65536)
    check_made_fast(foveate.create("radial", shape=(64, 32, 32)), 65536)
    # Frames that are no whole number of blocks.
    check_made_fast(foveate.create("radial", shape=(42, 30, 52)), 65520)


def test_refuses_what_does_not_fit():
    m = foveate.create("radial", shape=(4, 3, 4), text=2)
    with pytest.raises(ValueError, match="are 50 keys, got 48"):
        m(*qkv(48), causal=False)
    with pytest.raises(ValueError, match="noncausal attention only"):
        m(*qkv(50))
    for shape in ((48,), (2, 2, 2, 2), (4, 0)):
        with pytest.raises(ValueError, match="shape must be"):
            foveate.create("radial", shape=shape)
