"""What the tests of patterns on grids share."""

import time
from itertools import product
from math import prod

import pytest
import torch

import foveate
from foveate import ops
from foveate.attention.base import Call
from ops_tools import largest_output
from sparse_checks import qkv, softmax_over


def with_text(keep, text, first=False):
    """Pairs (n + text, n + text) of a grid's pairs keep (n, n) and text that sees and is seen."""
    n = len(keep)
    out = torch.ones(n + text, n + text, dtype=torch.bool)
    start = text if first else 0
    out[start : start + n, start : start + n] = keep
    return out


def coordinates(shape):
    return torch.tensor(list(product(*(range(n) for n in shape))))


def check_grid(name, keep, *, shape, text, tile, first=False, **options):
    """Every way of computing the pattern equals a plain softmax over the pairs keep (n, n)."""
    length = prod(shape) + text
    q, k, v = qkv(length, batch=2)
    seen = with_text(keep, text, first)
    want = softmax_over(q, k, v, seen)

    def made(**more):
        return foveate.create(name, shape=shape, text=text, **options | more)

    rows, tiled = made(block=16), made(tile=tile, block=prod(tile))
    for mechanism in (rows, tiled):
        torch.testing.assert_close(mechanism(q, k, v, causal=False), want, atol=1e-5, rtol=1e-4)
        chunk = mechanism(q[:, :, -20:], k, v, causal=False)
        torch.testing.assert_close(chunk, want[:, :, -20:], atol=1e-5, rtol=1e-4)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        mechanism(*leaves, causal=False).square().sum().backward()
        assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in leaves)
    other = torch.arange(length) % 5 > 0
    both = ops.dense(other.expand(length, length))
    want = softmax_over(q, k, v, seen & other)
    got = tiled(q, k, v, causal=False, mask=both)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def check_records(mechanism, length):
    """Density and retained mass of a call in tile order are those of a call in row order."""
    q, k, v = qkv(length)
    records = []
    mechanism(q, k, v, causal=False, call=Call(record=records.append))
    plain = foveate.create(mechanism.card.name, **vars(mechanism) | {"tile": ()})
    plain(q, k, v, causal=False, call=Call(record=records.append))
    assert 0 < records[0].density < records[1].density < 1
    assert records[0].retained_mass == pytest.approx(records[1].retained_mass, abs=1e-4)


def check_made_fast(mechanism, length):
    """The layout of a long pattern takes less than a second and no square tensor."""
    from foveate.attention import base

    blocks = (length // mechanism.block) ** 2
    rest = (length, length, False, 0, 1)
    began = time.process_time()
    base._layout_of.__wrapped__(mechanism, *rest)
    assert time.process_time() - began < 1.0
    assert largest_output(lambda: base._layout_of.__wrapped__(mechanism, *rest)) <= 8 * blocks


def check_refusals(name, shape):
    """Grids, texts and directions that do not fit are named."""
    made = foveate.create(name, shape=shape)
    length = prod(shape)
    with pytest.raises(ValueError, match=f"are {length} keys, got {length + 3}"):
        made(*qkv(length + 3), causal=False)
    with pytest.raises(ValueError, match="noncausal attention only, got causal=True"):
        made(*qkv(length))
    for option, words in (({"shape": ()}, "1 to 3 axes"), ({"text": -1}, "text must be")):
        with pytest.raises(ValueError, match=words):
            foveate.create(name, **{"shape": shape} | option)
