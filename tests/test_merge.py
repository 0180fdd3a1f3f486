import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from foveate.ops.reference import merge_reference
from ops_tools import assert_same, qkv


def part(seed, empty=0.0, dtype=torch.float64, spread=3.0):
    """A random partial attention; a share of its rows saw no key."""
    make = torch.Generator().manual_seed(seed)
    out = torch.randn(2, 3, 5, 4, generator=make, dtype=torch.float64)
    lse = torch.randn(2, 3, 5, generator=make, dtype=torch.float64) * spread
    none = torch.rand(lse.shape, generator=make) < empty
    out, lse = out.masked_fill(none[..., None], 0.0), lse.masked_fill(none, -math.inf)
    return out.to(dtype), lse if dtype == torch.float64 else lse.float()


seeds = st.integers(0, 10**6)
shares = st.sampled_from([0.0, 0.5, 1.0])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(seeds, shares), min_size=1, max_size=4))
def test_merge_is_its_definition(drawn):
    parts = [part(*each) for each in drawn]
    assert_same(ops.merge(parts), merge_reference(parts), torch.float64)
    gamma = [0.5 + n for n in range(len(parts))]
    assert_same(ops.merge(parts, gamma), merge_reference(parts, gamma), torch.float64)


@settings(max_examples=40, deadline=None)
@given(seeds, seeds, seeds, shares)
def test_merge_is_associative_and_ignores_order(x, y, z, empty):
    a, b, c = part(x, empty), part(y, empty), part(z)
    whole = ops.merge([a, b, c])
    assert_same(ops.merge([ops.merge([a, b]), c]), whole, torch.float64)
    assert_same(ops.merge([a, ops.merge([b, c])]), whole, torch.float64)
    assert_same(ops.merge([c, a, b]), whole, torch.float64)


def test_parts_of_the_keys_merge_to_attention_over_all():
    q, k, v = qkv(9, 40)
    cuts = [0, 1, 13, 13, 40]
    parts = [ops.attend(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in pairwise(cuts)]
    assert_same(ops.merge(parts), ops.attend(q, k, v, return_lse=True))


def test_a_part_without_keys_changes_nothing():
    a, none = part(0), part(1, empty=1.0)
    assert_same(ops.merge([a, none]), a, torch.float64)
    out, lse = ops.merge([none, none])
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_apart_masses_stay_finite(dtype):
    a, b = part(0, dtype=dtype, spread=1e4), part(1, dtype=dtype, spread=1e4)
    out, lse = ops.merge([a, b])
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.isfinite().all()
    stronger = (a[1] > b[1])[..., None]
    assert_same(out, torch.where(stronger, a[0], b[0]), dtype)
    assert_same(lse, torch.maximum(a[1], b[1]))


def test_gradients_are_exact_also_where_a_part_is_empty():
    (out, lse), none = part(0), part(1, empty=1.0)
    other = part(2)
    inputs = [x.requires_grad_() for x in (out, lse, *other)]

    def joined(out, lse, out2, lse2):
        return ops.merge([(out, lse), none, (out2, lse2)], [1.0, 1.0, 2.0])

    assert torch.autograd.gradcheck(joined, inputs)


@pytest.mark.parametrize(
    ("parts", "gamma", "words"),
    [
        ([], None, "at least one part, got none"),
        ([part(0)], [1.0, 2.0], r"gamma must hold 1 positive numbers, got \[1.0, 2.0\]"),
        ([part(0)], [0.0], "gamma must hold 1 positive"),
    ],
)
def test_bad_input_is_named(parts, gamma, words):
    with pytest.raises(ValueError, match=words):
        ops.merge(parts, gamma)
